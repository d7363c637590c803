"""Groups with given rewards, as a rollout would have left them, and the setup of a tiny run."""

import dataclasses

import numpy as np
from tiny_runs import tiny_config

from srft_jax.batch import Trajectory
from srft_jax.experience.batches import BatchOptions
from srft_jax.experience.collect import Sources
from srft_jax.experience.demonstrations import all_demonstrations
from srft_jax.experience.groups import Group
from srft_jax.experience.streams import Streams
from srft_jax.rollout import RolloutProgress
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


def streams_of(setup):
    return Streams(
        setup.data.texts["train"],
        setup.objective,
        prompts_per_step=setup.config.data.prompts_per_step,
        weights=[1.0],
        seed=setup.config.seed,
    )


def sources_of(setup, streams=None, **verdict):
    """The run's training set, whose demonstrations all have this verdict."""
    demonstrations = {
        place: dataclasses.replace(demonstration, **verdict)
        for place, demonstration in all_demonstrations(setup.data.train).items()
    }
    return Sources(setup.data.train, demonstrations, streams or streams_of(setup))


def batch_options(setup):
    return BatchOptions(
        setup.config.training,
        longest_sequence=setup.config.longest_sequence,
        length_cap=LENGTH_CAP,
    )


def made_trajectory(length=4, num_forced=0, **changes):
    """By default four tokens of version 0 that ended by themselves."""
    values = np.arange(length, dtype=np.float32)
    made = Trajectory(
        key="",
        tokens=np.arange(length) + 10,
        sampled=values >= num_forced,
        logprobs=-values,
        entropies=values,
        version=0,
        finished=True,
        text="text",
        verdict="right",
    )
    return dataclasses.replace(made, **changes)


def made_progress(**changes):
    """Progress of four completions of four tokens each, by default, in four seconds."""
    fields = dict(finished=4, total=4, tokens=16, steps=4, occupancy=0.75)
    seconds = dict(prefill_seconds=1.0, decode_seconds=2.5, host_seconds=0.5)
    return RolloutProgress(**(fields | seconds | changes))


def verified(reward):
    """What verification writes to a trajectory of this reward."""
    return dict(verifier_reward=float(reward), correct=reward >= 1)


def made_group(
    setup, index, rewards, *, demonstration=0, demonstration_reward=1.0, trajectories=None
):
    """A prompt of the run with completions of these rewards, and its demonstration if not None."""
    trajectories = trajectories or [made_trajectory() for _ in rewards]
    given = sources_of(setup, **verified(demonstration_reward)).demonstrations
    return Group(
        pair=(index, demonstration or 0),
        problem=setup.data.train[index],
        trajectories=[
            dataclasses.replace(trajectory, **verified(reward))
            for trajectory, reward in zip(trajectories, rewards, strict=True)
        ],
        demonstration=None if demonstration is None else given[index, demonstration],
    )
