"""Terms beside the verifier's reward: they move advantages, and nobody becomes correct by them."""

import dataclasses

import numpy as np
import pytest
from made_groups import (
    LENGTH_CAP,
    batch_options,
    made_group,
    made_progress,
    made_trajectory,
    setup_of,
)
from tiny_runs import tiny_config

from srft_jax.batch import RewardTerm
from srft_jax.config import ShapingConfig, UsageError
from srft_jax.data.examples import Example
from srft_jax.data.verifier_requests import probes
from srft_jax.experience.batches import gate, group_sequences
from srft_jax.experience.collect import _is_dropped
from srft_jax.experience.groups import Experience
from srft_jax.experience.metrics import rollout_metrics
from srft_jax.experience.scoring import Scorer, sample_row
from srft_jax.experience.verified_sampling import VerifiedRollout
from srft_jax.rewards import RewardResult
from srft_jax.setup.prepare import prepare

FORMAT = ShapingConfig("format", 0.5, {"boxed": True})
LENGTH = ShapingConfig("length", -0.25)


class Pool:
    """Rewards 1, 2, 3, ...; keeps the requests."""

    def score(self, requests, cancelled=None):
        self.requests = requests
        return [RewardResult(float(n), "wrong") for n, _ in enumerate(requests, start=1)]


class Letters:
    """Id 0 is `a`, id 1 is `b`, ..."""

    think_prefix = ""

    def decode(self, ids):
        return "".join(chr(ord("a") + token) for token in ids)


def with_terms(trajectory, *rewards):
    terms = tuple(RewardTerm("format", 1.0, reward, "wrong") for reward in rewards)
    return dataclasses.replace(trajectory, shaping=terms)


def shaped_group(setup, index, rewards, terms):
    group = made_group(setup, index, rewards)
    trajectories = [with_terms(*pair) for pair in zip(group.trajectories, terms, strict=True)]
    demonstration = with_terms(group.demonstration, 0.5)
    return dataclasses.replace(group, trajectories=trajectories, demonstration=demonstration)


def test_every_completion_is_asked_for_every_term():
    pool = Pool()
    examples = [Example("p", "g", kind="exact", metadata={"boxed": False, "x": n}) for n in (1, 2)]
    answers = [made_trajectory(tokens=np.arange(n)) for n in (4, 5)]
    scored = Scorer(pool, Letters(), [FORMAT, LENGTH]).score(examples, answers)
    assert [(one.kind, one.completion, one.metadata) for one in pool.requests] == [
        ("exact", "abcd", {"boxed": False, "x": 1, "prompt": "p", "num_tokens": 4}),
        ("format", "abcd", {"boxed": True, "x": 1, "prompt": "p", "num_tokens": 4}),
        ("length", "abcd", {"boxed": False, "x": 1, "prompt": "p", "num_tokens": 4}),
        ("exact", "abcde", {"boxed": False, "x": 2, "prompt": "p", "num_tokens": 5}),
        ("format", "abcde", {"boxed": True, "x": 2, "prompt": "p", "num_tokens": 5}),
        ("length", "abcde", {"boxed": False, "x": 2, "prompt": "p", "num_tokens": 5}),
    ]
    assert [one.verifier_reward for one in scored] == [1, 4]
    assert [one.reward for one in scored] == [1 + 0.5 * 2 - 0.25 * 3, 4 + 0.5 * 5 - 0.25 * 6]
    row = sample_row("rollout", examples[0], scored[0])
    assert row["shaping"] == {"format": 2, "length": 3} and row["completion"] == "abcd"


def test_advantages_are_of_the_whole_reward_and_correct_is_the_verifiers(tmp_path):
    setup = setup_of(tmp_path, "srft", advantage_std="false")
    group = shaped_group(setup, 0, [1.0, 0.0, 0.0], [0.0, 2.0, 0.0])
    objective = setup.stages.at(1).objective
    sequences = group_sequences(group, objective, batch_options(setup))
    rewards = np.asarray([1.0, 2.0, 0.0, 1.5])
    assert [one.advantage for one in sequences] == pytest.approx(rewards - rewards.mean())
    assert [one.trajectory.correct for one in sequences] == [True, False, False, True]


def test_gates_and_dropping_look_at_the_verifier_alone(tmp_path):
    setup = setup_of(tmp_path, "hpt")
    objective = setup.objective
    unsolved = shaped_group(setup, 0, [0.0, 0.0, 0.0], [2.0, 0.0, 0.0])
    assert gate(unsolved, objective).demonstration is not None
    dapo = setup_of(tmp_path, "dapo").objective
    assert _is_dropped(unsolved, dapo)
    assert not _is_dropped(shaped_group(setup, 0, [1.0, 0.0, 0.5], [0.0, 1.0, 0.5]), dapo)


def test_metrics_show_every_part(tmp_path):
    setup = setup_of(tmp_path, "grpo")

    def metrics(group):
        rollout = VerifiedRollout([], made_progress(), 0.0)
        experience = Experience([group], [group], 0, 0, [rollout])
        values = rollout_metrics(experience, setup.objective, length_cap=LENGTH_CAP)
        names = ("rollout/reward", "rollout/accuracy", "rewards/verifier", "rewards/format")
        return [values.get(name) for name in names]

    assert metrics(shaped_group(setup, 0, [1.0, 0.0], [0.5, 2.0])) == [1.75, 0.5, 0.5, 1.25]
    assert metrics(made_group(setup, 0, [1.0, 0.0])) == [0.5, 0.5, None, None]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ('[{"kind": "formal", "weight": 1}]', "unknown reward kind 'formal'"),
        ('[{"kind": "format", "weight": 1, "options": {"box": 1}}]', "no option 'box'"),
        ('[{"kind": "format", "weight": .nan}]', "format with weight nan"),
        ('[{"kind": "length", "weight": 1}, {"kind": "length", "weight": 2}]', "length twice"),
        ('[{"kind": "format"}]', "weight"),
    ],
)
def test_mistakes(tmp_path, terms, message):
    with pytest.raises(UsageError, match=message):
        prepare(tiny_config(tmp_path / "run", f"--rewards.shaping={terms}"))


def test_verifiers_are_tried_on_the_first_rows_of_each_kind():
    rows = [Example(str(n), "7", kind="exact") for n in range(5)]
    rows += [Example("p", "8", ("<think></think>eight",), kind="a:b", where="x.jsonl, row 9")]
    found = probes({"train": rows, "ood": rows[:1]}, [FORMAT])
    assert [one.where for one in found if one.kind == "exact"] == [
        "train, row 1",
        "train, row 2",
        "train, row 3",
        "ood, row 1",
    ]
    (own,) = [one for one in found if one.kind == "a:b"]
    assert (own.where, own.completion) == ("x.jsonl, row 9", "<think></think>eight")
    assert [one.kind for one in found].count("format") == 5
