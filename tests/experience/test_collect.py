"""What is sampled for a step: groups, refills, and completions that start with a demonstration."""

import functools
import json
import re
import shutil

import numpy as np
import pytest
from dry_run import dry_generate, traced_run
from made_groups import (
    LENGTH_CAP,
    made_progress,
    made_trajectory,
    setup_of,
    sources_of,
    streams_of,
)
from tiny_runs import ROOT, tiny_config

from srft_jax.data.pipeline import NO_DEMONSTRATION, PromptBatch
from srft_jax.experience.collect import GroupOptions, _requests, collect
from srft_jax.experience.metrics import rollout_metrics
from srft_jax.experience.scoring import Scorer
from srft_jax.report.terminal import ProgressLine
from srft_jax.rewards import RewardResult
from srft_jax.tasks import begin


class FourTokens:
    """Stands in for the sampler: four tokens behind what is forced; keeps requests and keys."""

    def __init__(self):
        self.calls = []

    def submit(self, requests, key, slots=None):
        self.calls.append((requests, key))

    def stream(self, observer):
        for request in self.calls[-1][0]:
            tokens, num_forced = [*request.forced, 11, 12, 13, 14], len(request.forced)
            for member in range(request.first_member, request.first_member + request.group_size):
                yield made_trajectory(
                    len(tokens),
                    num_forced,
                    tokens=np.asarray(tokens),
                    group=request.group,
                    member=member,
                )
        observer(made_progress())


class Pool:
    """Rewards one after the other, from a list without end."""

    def __init__(self, rewards):
        self._rewards = iter(rewards)

    def score(self, requests, cancelled=None):
        return [RewardResult(next(self._rewards), "right") for _ in requests]


def group_options(setup):
    rollout = setup.config.rollout
    return GroupOptions(
        setup.config.data.prompts_per_step, rollout.completions_per_prompt, stop_ids=(0,)
    )


def collect_step(setup, rewards, step=1, **verdict):
    """The experience of a step, and the calls of the sampler."""
    sampler, scorer = FourTokens(), Scorer(Pool(rewards), setup.tokenizer)
    sources, stage = sources_of(setup, **verdict), setup.stages.at(step)
    found = collect(sampler, scorer, sources, group_options(setup), stage, step)
    return found, sampler.calls


def metrics_of(setup, experience):
    objective = setup.stages.at(1).objective
    return rollout_metrics(experience, objective, length_cap=LENGTH_CAP)


MIXED, EQUAL = [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]


class TestRefills:
    """Four prompts a step, three completions each, and up to two refills."""

    @pytest.fixture
    def setup(self, tmp_path):
        return setup_of(tmp_path, "dapo", max_refills=2)

    def metrics(self, setup, found):
        values = metrics_of(setup, found)
        return [values[f"rollout/{name}"] for name in ("refills", "groups_dropped", "accuracy")]

    def test_none_where_none_is_needed(self, setup):
        found, calls = collect_step(setup, MIXED * 4)
        assert (len(found.groups), len(calls)) == (4, 1)
        assert self.metrics(setup, found) == [0, 0, 1 / 3]

    def test_further_prompts_replace_groups_of_equal_rewards(self, setup):
        """Two of four are dropped; of the next four one is, and one is too many."""
        rewards = MIXED + EQUAL + MIXED + EQUAL + MIXED + MIXED + EQUAL + MIXED
        found, calls = collect_step(setup, rewards)
        assert [len(found.sampled), len(found.groups), len(calls)] == [8, 4, 2]
        assert found.groups == [found.sampled[i] for i in (0, 2, 4, 5)]
        assert self.metrics(setup, found) == pytest.approx([1, 3, (5 * 1 + 3 * 3) / 24])
        examples = [group.pair[0] for group in found.sampled]
        streams = streams_of(setup)
        batches = [streams.prompts(setup.objective) for _ in range(2)]
        assert examples == [i for batch in batches for i in batch.example]

    def test_keys_differ(self, setup):
        _, calls = collect_step(setup, EQUAL * 12)
        assert len({str(key) for _, key in calls}) == 3

    def test_they_are_used_up(self, setup):
        found, calls = collect_step(setup, EQUAL * 11 + MIXED)
        assert (len(calls), len(found.groups)) == (3, 1)
        assert self.metrics(setup, found)[:2] == [2, 11]

    def test_a_right_demonstration_makes_a_group_of_wrong_ones_worth_it(self, tmp_path):
        """Where it counts for the advantage."""
        for group, dropped in (("augmented", 0), ("self", 4)):
            setup = setup_of(tmp_path, "luffy", drop_zero_std="true", advantage_group=group)
            found, _ = collect_step(setup, [0.0] * 12, verifier_reward=1.0)
            assert found.dropped == dropped


def test_shares_of_groups_add_up(tmp_path):
    setup = setup_of(tmp_path, "grpo")
    found, _ = collect_step(setup, MIXED + EQUAL + MIXED + [0.0] * 3)
    values = metrics_of(setup, found)
    shares = [values[f"rollout/groups_{name}"] for name in ("all_right", "all_wrong", "mixed")]
    assert shares == [0.25, 0.25, 0.5]
    assert values["rollout/groups_zero_std"] == shares[0] + shares[1]
    lengths = [values[f"rollout/length{name}"] for name in ("_min", "", "_max")]
    assert lengths == [4, 4, 4]
    verdicts = [value for name, value in values.items() if name.startswith("rewards/")]
    assert sum(verdicts) == 1


def test_times_of_refills_add_up(tmp_path):
    """A rollout and a refill, of four seconds and sixteen tokens each."""
    setup = setup_of(tmp_path, "dapo", max_refills=1)
    found, _ = collect_step(setup, EQUAL * 8)
    values = metrics_of(setup, found)
    parts = [values[f"time/rollout_{part}"] for part in ("prefill", "decode", "host")]
    assert parts == [2.0, 5.0, 1.0]
    assert values["perf/rollout_tokens_per_second"] == 4.0
    assert values["rollout/occupancy"] == 0.75
    assert values["time/reward_wait"] == sum(one.reward_wait for one in found.rollouts) > 0


@pytest.mark.slow
def test_a_run_says_how_far_its_rollouts_are(tmp_path, monkeypatch):
    """Where they take long."""
    out = traced_run(tiny_config(tmp_path / "run", "--training.num_steps=2")).out
    assert "occupancy" not in out
    impatient = functools.partial(ProgressLine, patience_in_log=0.0)
    monkeypatch.setattr(begin, "ProgressLine", impatient)
    out = traced_run(tiny_config(tmp_path / "other", "--training.num_steps=2")).out
    for what in ("step 0, evaluation", "step 1/2, rollout", "step 2/2, rollout"):
        assert f"\n{what}  4/4 completions  4 tokens/s  occupancy 75%\n" in out


def test_no_rollout_no_times(tmp_path):
    setup = setup_of(tmp_path, "sft")
    found, calls = collect_step(setup, [])
    assert len(found.groups) == 4 and not calls
    assert metrics_of(setup, found) == {}


class TestPrefixes:
    """A share of .5 of every demonstration, then none."""

    SHARE = dict(prefix_start=0.5, prefix_end=0.5, prefix_chunks=0, prefix_until=2)

    def requests(self, setup, step=1):
        found, [(requests, _)] = collect_step(setup, MIXED * 4, step)
        return found, requests

    def expected(self, setup, found):
        """The first half of the demonstration of each group's prompt."""
        tokens = [group.problem.demonstrations[0] for group in found.groups]
        return [list(one[: round(0.5 * len(one))]) for one in tokens]

    def test_all_start_alike(self, tmp_path):
        setup = setup_of(tmp_path, "uft", kl=0, **self.SHARE)
        found, requests = self.requests(setup)
        assert [request.group_size for request in requests] == [3] * 4
        assert [list(request.forced) for request in requests] == self.expected(setup, found)
        for group, forced in zip(found.groups, self.expected(setup, found), strict=True):
            assert all(one.tokens[: len(forced)].tolist() == forced for one in group.trajectories)

    def test_one_starts_with_it(self, tmp_path):
        setup = setup_of(tmp_path, "prefix_rft", **self.SHARE)
        found, requests = self.requests(setup)
        assert [request.group_size for request in requests] == [2, 1] * 4
        assert [list(one.forced) for one in requests[1::2]] == self.expected(setup, found)
        assert not any(one.forced for one in requests[::2])
        counts = [[one.num_forced > 0 for one in group.trajectories] for group in found.groups]
        assert counts == [[False, False, True]] * 4

    def test_the_verifier_reads_it_too(self, tmp_path):
        setup = setup_of(tmp_path, "uft", kl=0, **self.SHARE)
        found, _ = self.requests(setup)
        for group, forced in zip(found.groups, self.expected(setup, found), strict=True):
            assert group.trajectories[0].text.startswith(setup.tokenizer.decode(forced))

    def test_whole_demonstrations_are_no_rows(self, tmp_path):
        setup = setup_of(tmp_path, "uft", kl=0, **self.SHARE)
        found, _ = self.requests(setup)
        assert all(group.demonstration is None for group in found.groups)

    @pytest.mark.parametrize(
        ("case", "step"), [(dict(), 3), (dict(prefix_until=0), 1), (dict(sft_steps=1), 4)]
    )
    def test_there_is_none_later(self, tmp_path, case, step):
        """prefix_until counts the stage's own steps."""
        setup = setup_of(tmp_path, "prefix_rft", **(self.SHARE | case))
        _, requests = self.requests(setup, step)
        assert [(one.group_size, len(one.forced)) for one in requests] == [(3, 0)] * 4

    def test_the_stages_own_steps_count(self, tmp_path):
        setup = setup_of(tmp_path, "prefix_rft", sft_steps=1, **self.SHARE)
        assert any(request.forced for request in self.requests(setup, step=3)[1])

    def test_the_share_is_drawn_for_each_step_and_prompt(self, tmp_path):
        drawn = self.SHARE | dict(prefix_start=1.0, prefix_end=0.0, prefix_steps=0, prefix_until=9)
        setup = setup_of(tmp_path, "uft", kl=0, **drawn)

        def lengths(step):
            return [len(request.forced) for request in self.requests(setup, step)[1]]

        assert lengths(1) == lengths(1)
        assert lengths(1) != lengths(2)
        assert len(set(lengths(1) + lengths(2))) > 3

    def test_prompts_without_demonstration_have_plain_groups(self, tmp_path):
        setup = setup_of(tmp_path, "prefix_rft", **self.SHARE)
        requests = _requests(
            sources_of(setup),
            group_options(setup),
            setup.stages.at(1),
            1,
            PromptBatch(np.asarray([0, 1]), np.asarray([NO_DEMONSTRATION] * 2)),
        )
        assert [(one.group_size, len(one.forced)) for one in requests] == [(3, 0)] * 2


def test_every_stop_id_of_the_model_ends_completions(tmp_path):
    """In rollouts, evaluations and the verb generate."""
    shutil.copytree(ROOT / "assets" / "tokenizer", tmp_path / "tokenizer")
    stops = json.dumps({"eos_token_id": [0, 1]})
    (tmp_path / "tokenizer" / "generation_config.json").write_text(stops)
    arguments = f"--model.tokenizer={tmp_path}/tokenizer", "--training.num_steps=1"
    config = tiny_config(tmp_path / "run", *arguments)
    sampled = [line for line in traced_run(config).lines if line.startswith("sample ")]
    assert len(sampled) == 3  # before the step, in it and after it
    for call in [*sampled, dry_generate(config)]:
        assert set(re.findall(r'"stop_ids": (\[.*?\])', call)) == {"[1, 0]"}
