"""Warnings of verifiers that do not judge."""

import numpy as np

from srft_jax.batch import RewardTerm, Trajectory
from srft_jax.data.encoding import EncodedExample
from srft_jax.data.examples import Example
from srft_jax.experience.groups import Group
from srft_jax.report.verdict_watch import VerdictWatch


def scored(verdicts, kind="math", shaping=()):
    """A group with a completion for each of these verdicts."""
    problem = EncodedExample(Example("How many?", "7", kind=kind), prompt=np.array([1]))
    trajectories = [
        Trajectory(
            key=problem.key,
            tokens=np.array([2]),
            sampled=np.array([True]),
            logprobs=np.zeros(1, np.float32),
            entropies=np.zeros(1, np.float32),
            version=0,
            finished=True,
            text=f"text {number}",
            verdict=verdict,
            shaping=shaping,
        )
        for number, verdict in enumerate(verdicts)
    ]
    return [Group(pair=(0, 0), problem=problem, trajectories=trajectories, demonstration=None)]


def test_more_than_a_fifth_is_warned_of_once_with_an_example():
    watch = VerdictWatch()
    assert not list(watch.warnings(1, scored(["timeout"] + ["right"] * 4)))
    assert not list(watch.warnings(2, scored(["wrong"] * 5)))
    (warning,) = watch.warnings(3, scored(["right"] * 3 + ["timeout"] * 2))
    for part in ("step 3", "the verdict of math is timeout for 40%", "How many?", "text 3"):
        assert part in warning
    assert not list(watch.warnings(4, scored(["timeout"] * 5)))
    (warning,) = watch.warnings(5, scored(["timeout"] * 3 + ["unparsed"] * 2))
    assert "unparsed for 40%" in warning and "Do the chat template" in warning


def test_kinds_are_told_apart():
    """A fifth of all, but all of one kind; terms of the reward count as kinds too."""
    watch = VerdictWatch()
    mixed = scored(["right"] * 9) + scored(["crash"], kind="mine:f")
    (warning,) = watch.warnings(1, mixed)
    assert "mine:f is crash for 100%" in warning
    term = RewardTerm("other:g", 1.0, 0.0, "crash")
    (warning,) = watch.warnings(2, scored(["right"] * 3, shaping=(term,)))
    assert "other:g is crash for 100%" in warning
    assert not list(watch.warnings(3, []))
