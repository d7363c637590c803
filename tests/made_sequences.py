"""Training sequences of given tokens and log-probs."""

import numpy as np

from srft_jax.batch import GIVEN, Role, Trajectory
from srft_jax.objectives.rows import TrainingSequence


def made_sequence(
    prompt, completion, role, advantage=0.0, correct=False, old_logprobs=None, weight=1.0
):
    """A prompt and an answer, whose tokens of role SELF the policy has drawn."""
    tokens = np.asarray(completion, np.int32)
    roles = np.broadcast_to(np.asarray(role, np.int32), len(tokens))
    trajectory = Trajectory(
        key="",
        tokens=tokens,
        sampled=roles == Role.SELF,
        logprobs=None if old_logprobs is None else np.asarray(old_logprobs, np.float32),
        entropies=None,
        version=GIVEN if (roles == Role.DEMONSTRATION).all() else 0,
        finished=True,
        correct=correct,
    )
    return TrainingSequence(prompt, trajectory, role, advantage, weight)
