"""Groups with given rewards, as a rollout would have left them, and the setup of a tiny run."""

import numpy as np
from tiny_runs import tiny_config

from srft_jax.experience.rollouts import Group
from srft_jax.experience.verdicts import Scored
from srft_jax.rollout import Completion, Progress
from srft_jax.setup.prepare import prepare

LENGTH_CAP = 16  # of the tiny run


def setup_of(path, preset, **coefficients):
    """A tiny run in which every training prompt has a demonstration."""
    flags = [f"--objective.{name}={value}" for name, value in coefficients.items()]
    return prepare(
        tiny_config(
            path / "run",
            "--data.train.procedural.demonstrated=40",
            "--objective.entropy_scope=token",
            f"--objective.preset={preset}",
            *flags,
        )
    )


def made_completion(length=4, **changes):
    values = np.arange(length, dtype=np.float32)
    arrays = dict(logprobs=-values, entropies=values, drawn_logprobs=-values)
    return Completion(**(dict(tokens=np.arange(length) + 10, finished=True) | arrays | changes))


def made_progress(**changes):
    """Of four completions of four tokens each, by default, in four seconds."""
    fields = dict(finished=4, total=4, tokens=16, steps=4, occupancy=0.75)
    seconds = dict(prefill_seconds=1.0, decode_seconds=2.5, host_seconds=0.5)
    return Progress(**(fields | seconds | changes))


def made_group(example, rewards, *, demonstration=0, demonstration_reward=1.0, completions=None):
    """By default completions of four tokens that ended by themselves."""
    return Group(
        example=example,
        completions=completions or [made_completion() for _ in rewards],
        scored=[Scored(None, "text", reward, "right") for reward in rewards],
        demonstration=demonstration,
        demonstration_scored=Scored(None, "text", demonstration_reward, "right"),
    )
