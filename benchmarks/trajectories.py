"""Trajectories of random tokens, as a sampler or a data set would bring them."""

import numpy as np

from srft_jax.batch import GIVEN, Trajectory


def random_trajectory(tokens: np.ndarray, logprob: float | None, correct: bool) -> Trajectory:
    """Return an answer whose tokens all have this log-prob; None makes it a demonstration."""
    given = logprob is None
    return Trajectory(
        key="",
        tokens=tokens,
        sampled=np.full(len(tokens), not given),
        logprobs=None if given else np.full(len(tokens), logprob, np.float32),
        entropies=None,
        version=GIVEN if given else 0,
        finished=True,
        correct=correct,
    )
