"""What of a group is trained on: gates, filters, buffers, roles and weights."""

import dataclasses

import numpy as np
import pytest
from made_groups import (
    LENGTH_CAP,
    batch_options,
    made_group,
    made_trajectory,
    setup_of,
    sources_of,
    streams_of,
)

from srft_jax.batch import Role
from srft_jax.experience.batches import (
    demonstration_sequence,
    gate,
    group_sequences,
    pack_updates,
    plan_updates,
)
from srft_jax.setup.prepare import prepare

SELF, DEMONSTRATION = Role.SELF, Role.DEMONSTRATION


def updates_of(setup, groups, step=1, streams=None, version=0):
    sources = sources_of(setup, streams)
    options, stages = batch_options(setup), setup.stages
    return pack_updates(plan_updates(groups, sources, options, stages, step), options, version)


def tokens_of(batch, role):
    return int((batch.rows.loss_mask & (batch.rows.role == role)).sum())


def sequences_of(setup, group):
    return group_sequences(group, setup.stages.at(1).objective, batch_options(setup))


class TestGate:
    """Groups of three with 0 to 3 correct completions; the gate lets at most 1 pass."""

    @pytest.fixture
    def parts(self, tmp_path):
        """Number of completions, and whether there is a demonstration, by correct completions."""

        def parts(kind, demonstration=0):
            preset = {"demonstrations": "sft_plus_rl", "either": "hpt"}[kind]
            setup = setup_of(tmp_path, preset, gate=kind, gate_solved=1)
            rewards = [[1.0] * solved + [0.0] * (3 - solved) for solved in range(4)]
            groups = [made_group(setup, 0, one, demonstration=demonstration) for one in rewards]
            gated = [gate(group, setup.objective) for group in groups]
            return [(len(one.trajectories), one.demonstration is not None) for one in gated]

        return parts

    def test_demonstrations_of_prompts_that_are_too_hard(self, parts):
        assert parts("demonstrations") == [(3, True), (3, True), (3, False), (3, False)]

    def test_either_the_demonstration_or_the_completions(self, parts):
        assert parts("either") == [(0, True), (0, True), (3, False), (3, False)]

    @pytest.mark.parametrize("kind", ["demonstrations", "either"])
    def test_a_prompt_without_a_demonstration_keeps_its_completions(self, parts, kind):
        assert parts(kind, demonstration=None) == [(3, False)] * 4


def test_the_gate_is_in_the_batch(tmp_path):
    """A solved prompt gives its completions, an unsolved one its demonstration."""
    setup = setup_of(tmp_path, "hpt")
    [update] = updates_of(setup, [made_group(setup, 0, [1, 0, 0]), made_group(setup, 1, [0, 0, 0])])
    assert tokens_of(update.batch, SELF) == 3 * 4
    expected = len(setup.data.train[1].demonstrations[0])
    assert tokens_of(update.batch, DEMONSTRATION) == expected


def test_behavior_logprobs_of_a_demonstration_are_its_old_logprobs(tmp_path):
    setup = setup_of(tmp_path, "srft")
    demonstration = setup.data.train[0].demonstrations[0]
    known = -np.arange(1.0, 1 + len(demonstration))
    example = dataclasses.replace(setup.data.train[0], behavior_logprobs=(known,))
    train = (example, *setup.data.train[1:])
    setup = dataclasses.replace(setup, data=dataclasses.replace(setup.data, train=train))
    sources = sources_of(setup)
    first, second = (demonstration_sequence(sources, (index, 0)) for index in (0, 1))
    assert first.trajectory.logprobs is known and second.trajectory.logprobs is None
    [update] = updates_of(setup, [made_group(setup, 0, [1, 0, 0]), made_group(setup, 1, [1, 0, 0])])
    is_demonstration = update.batch.rows.role == DEMONSTRATION
    old = update.batch.rows.old_logprobs[is_demonstration]
    assert sorted(old[old != 0]) == sorted(known)
    assert (old == 0).sum() == len(setup.data.train[1].demonstrations[0])


class TestFilters:
    LONG = made_trajectory(LENGTH_CAP, finished=False)

    def kept(self, tmp_path, preset, rewards, trajectories, **coefficients):
        setup = setup_of(tmp_path, preset, **coefficients)
        group = made_group(setup, 0, rewards, trajectories=trajectories, demonstration=None)
        return [len(one.trajectory.tokens) for one in sequences_of(setup, group)]

    def test_only_what_is_correct_and_ended(self, tmp_path):
        trajectories = [made_trajectory(2), made_trajectory(3), self.LONG]
        assert self.kept(tmp_path, "on_policy_sft", [1, 0, 1], trajectories) == [2]

    def test_truncated_ones_left_out_count_for_the_advantage(self, tmp_path):
        trajectories = [made_trajectory(2), made_trajectory(3), self.LONG]
        setup = setup_of(tmp_path, "dr_grpo", mask_truncated="true")
        group = made_group(setup, 0, [1, 0, 0], trajectories=trajectories, demonstration=None)
        found = {len(one.trajectory.tokens): one.advantage for one in sequences_of(setup, group)}
        assert found == pytest.approx({2: 2 / 3, 3: -1 / 3})

    def test_the_overlong_penalty_enters_advantages_alone(self, tmp_path):
        """Half of the cap is buffer: 12 of 16 tokens cost half a point, 16 a whole one."""
        trajectories = [made_trajectory(n) for n in (8, 12, 16)]
        setup = setup_of(tmp_path, "dr_grpo", overlong_buffer=0.5)
        group = made_group(setup, 0, [1, 1, 1], trajectories=trajectories, demonstration=None)
        sequences = sequences_of(setup, group)
        assert [one.advantage for one in sequences] == pytest.approx([0.5, 0.0, -0.5])
        assert all(one.trajectory.correct for one in sequences)

    def test_completions_that_only_set_the_advantage_are_no_rows(self, tmp_path):
        """Unless their entropy is raised."""
        for bonus, expected in [(0, [DEMONSTRATION]), (0.1, [SELF, SELF, SELF, DEMONSTRATION])]:
            setup = setup_of(tmp_path, "luffy", self_form="none", entropy_bonus=bonus)
            found = sequences_of(setup, made_group(setup, 0, [1, 0, 0]))
            assert [one.role for one in found] == expected
            assert found[-1].advantage == pytest.approx(0.5)


class TestNothingToLearn:
    def test_equal_rewards_have_no_gradient(self, tmp_path):
        setup = setup_of(tmp_path, "grpo")
        assert updates_of(setup, [made_group(setup, 0, [1, 1, 1])]) == []

    def test_the_entropy_bonus_teaches_without_an_advantage(self, tmp_path):
        setup = setup_of(tmp_path, "grpo", entropy_bonus=0.1)
        assert len(updates_of(setup, [made_group(setup, 0, [1, 1, 1])])) == 1

    def test_nothing_is_left(self, tmp_path):
        setup = setup_of(tmp_path, "on_policy_sft")
        assert updates_of(setup, [made_group(setup, 0, [0, 0, 0], demonstration=None)]) == []
        assert updates_of(setup, []) == []

    @pytest.mark.parametrize("preset", ["srft", "hpt", "sft_plus_rl"])
    def test_demonstrations_teach_beside_equal_rewards(self, tmp_path, preset):
        setup = setup_of(tmp_path, preset)
        assert len(updates_of(setup, [made_group(setup, 0, [0, 0, 0])])) == 1

    def test_wrong_completions_teach_by_likelihood(self, tmp_path):
        setup = setup_of(tmp_path, "srft_paper")
        group = made_group(setup, 0, [0, 0, 0], demonstration=None)
        assert len(updates_of(setup, [group])) == 1

    def test_a_part_of_the_rollout_without_a_gradient_makes_no_update(self, tmp_path):
        setup = setup_of(tmp_path, "grpo")
        groups = [made_group(setup, 0, [1, 1, 1]), made_group(setup, 1, [0, 1, 0])]
        assert len(updates_of(setup, groups)) == 1
        assert len(updates_of(two_updates(setup), groups)) == 1
        assert len(updates_of(two_updates(setup), [*groups[1:], *groups[1:]])) == 2


def two_updates(setup):
    training = dataclasses.replace(setup.config.training, updates_per_rollout=2)
    return prepare(dataclasses.replace(setup.config, training=training))


class TestBuffer:
    """ReLIFT with a buffer of three."""

    @pytest.fixture
    def setup(self, tmp_path):
        return setup_of(tmp_path, "relift", demo_buffer=3)

    def test_demonstrations_of_failures_wait_until_there_are_enough(self, setup):
        streams = streams_of(setup)
        [first] = updates_of(
            setup,
            [made_group(setup, 0, [0, 0, 0]), made_group(setup, 1, [0, 1, 0])],
            streams=streams,
        )
        assert (first.stage.name, tokens_of(first.batch, DEMONSTRATION)) == ("policy", 0)
        assert tokens_of(first.batch, SELF) == 2 * 3 * 4
        assert streams.num_buffered == 1
        groups = [made_group(setup, example, [0, 0, 0]) for example in (2, 3, 4)]
        policy, buffered = updates_of(setup, groups, streams=streams)
        assert (policy.stage.name, buffered.stage.name) == ("policy", "buffered")
        assert buffered.stage.optimizer == "demonstration"
        expected = sum(len(setup.data.train[i].demonstrations[0]) for i in (0, 2, 3))
        assert tokens_of(buffered.batch, DEMONSTRATION) == expected
        assert tokens_of(buffered.batch, SELF) == 0
        assert streams.take_buffered(3) == [(4, 0)]

    def test_several_full_buffers(self, setup):
        groups = [made_group(setup, example, [0, 0, 0]) for example in range(7)]
        names = [update.stage.name for update in updates_of(setup, groups)]
        assert names == ["policy", "buffered", "buffered"]

    def test_its_coefficients_are_the_objectives(self, tmp_path):
        setup = setup_of(tmp_path, "relift", demo_nll=0.5, demo_nll_probability="p")
        row = setup.stages.buffered.objective
        assert (row.demo_nll, row.demo_nll_probability, row.self_form) == (0.5, "p", "none")

    def test_waiting_demonstrations_are_in_the_state(self, setup):
        streams, restored = streams_of(setup), streams_of(setup)
        streams.buffer([(3, 0), (1, 0)])
        restored.restore(streams.state(), "run")
        assert restored.take_buffered(2) == [(3, 0), (1, 0)]


class TestOwnDemonstrations:
    @pytest.fixture
    def setup(self, tmp_path):
        return setup_of(tmp_path, "chord", demo_per_step=5, mix_steps=2)

    def test_they_come_beside_the_groups(self, setup):
        streams, other = streams_of(setup), streams_of(setup)
        [update] = updates_of(
            setup, [made_group(setup, 0, [1, 0, 0], demonstration=None)], streams=streams
        )
        pairs = other.demonstrations()
        assert len(pairs) == 5
        lengths = [len(setup.data.train[i].demonstrations[n]) for i, n in pairs]
        assert tokens_of(update.batch, DEMONSTRATION) == sum(lengths)
        assert streams.demonstrations() == other.demonstrations()  # both are one batch on

    def test_they_are_not_the_rollouts_prompts(self, setup):
        streams = streams_of(setup)
        prompts = [i for _ in range(5) for i, _ in streams.prompts(setup.objective).pairs()]
        own = [i for _ in range(4) for i, _ in streams.demonstrations()]
        assert prompts != own

    @pytest.mark.parametrize(("step", "mu"), [(1, 0.9), (2, 0.475), (3, 0.05), (9, 0.05)])
    def test_their_share_falls_by_a_cosine(self, setup, step, mu):
        [update] = updates_of(setup, [made_group(setup, 0, [1, 0, 0], demonstration=None)], step)
        rows = update.batch.rows
        weights_by_role = [set(rows.weight[rows.role == role]) for role in (DEMONSTRATION, SELF)]
        assert weights_by_role == [{np.float32(mu)}, {np.float32(1 - mu)}]

    def test_they_are_split_between_the_updates(self, setup):
        groups = [made_group(setup, i, [1, 0, 0], demonstration=None) for i in range(2)]
        parts = updates_of(two_updates(setup), groups)
        assert all(tokens_of(part.batch, DEMONSTRATION) for part in parts)
        assert [tokens_of(part.batch, SELF) for part in parts] == [12, 12]


class TestPrefixes:
    TRAJECTORIES = (made_trajectory(4), made_trajectory(4), made_trajectory(6, num_forced=4))

    def roles(self, tmp_path, preset, **coefficients):
        setup = setup_of(tmp_path, preset, **coefficients)
        group = made_group(setup, 0, [0, 1, 1], trajectories=self.TRAJECTORIES, demonstration=None)
        return [one.roles.tolist() for one in sequences_of(setup, group)]

    def test_hints_are_learned_by_likelihood(self, tmp_path):
        found = self.roles(tmp_path, "uft", kl=0)
        assert found == [[SELF] * 4, [SELF] * 4, [Role.HINT] * 4 + [SELF] * 2]

    def test_prefixes_by_policy_gradient_where_entropy_is_highest(self, tmp_path):
        """Entropies 0, 1, 2, 3; half of four tokens."""
        found = self.roles(tmp_path, "prefix_rft", prefix_top_entropy=0.5)
        prefix = [Role.NONE] * 2 + [Role.PREFIX] * 2
        assert found == [[SELF] * 4, [SELF] * 4, prefix + [SELF] * 2]

    def test_or_not_at_all(self, tmp_path):
        found = self.roles(tmp_path, "prefix_rft", prefix_policy=0)
        assert found[2] == [Role.NONE] * 4 + [SELF] * 2

    def test_the_baseline_is_of_completions_without(self, tmp_path):
        """Rewards 0 and 1 without, 1 with a prefix; all three count where all have one."""
        setup = setup_of(tmp_path, "prefix_rft")
        group = made_group(setup, 0, [0, 1, 1], trajectories=self.TRAJECTORIES, demonstration=None)
        one = sequences_of(setup, group)
        assert [x.advantage for x in one] == [-0.5, 0.5, 0.5]
        all_of_them = sequences_of(setup_of(tmp_path, "prefix_rft", prefix="all"), group)
        assert [x.advantage for x in all_of_them] == pytest.approx([-2 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    "preset", ["grpo", "srft", "hpt", "relift", "chord", "prefix_rft", "sft_rl"]
)
def test_the_largest_rollout_fits_the_static_shape(tmp_path, preset, updates):
    """Every completion, every demonstration, all as long as can be."""
    setup = setup_of(tmp_path, preset, sft_steps=2, demo_per_step=9)
    setup = two_updates(setup) if updates == 2 else setup
    long = [made_trajectory(LENGTH_CAP)] * 3
    for step in (1, 3):
        stage = setup.stages.at(step)
        trajectories, rewards = ([], []) if stage.name == "sft" else (long, [0.0, 1.0, 0.0])
        in_group = stage.objective.trains_demonstrations and stage.objective.demo_source == "group"
        groups = [
            made_group(
                setup, i, rewards, trajectories=trajectories, demonstration=0 if in_group else None
            )
            for i in range(4)
        ]
        found = updates_of(setup, groups, step)
        assert [one.stage for one in found] == [stage] * updates


class TestOnPolicy:
    """Decided by the versions in the trajectories, not by the configuration."""

    def updates(self, setup, versions, version=7):
        trajectories = [made_trajectory(version=drawn) for drawn in versions]
        group = made_group(setup, 0, [1, 0, 0], trajectories=trajectories)
        other = made_group(setup, 1, [0, 1, 0], trajectories=trajectories)
        return [
            update.batch.on_policy for update in updates_of(setup, [group, other], version=version)
        ]

    def test_all_drawn_by_the_parameters_at_hand(self, tmp_path):
        """Demonstrations have no version, and make nothing stale."""
        assert self.updates(setup_of(tmp_path, "srft"), [7, 7, 7]) == [True]

    @pytest.mark.parametrize("stale", [6, 0])
    def test_one_stale_trajectory(self, tmp_path, stale):
        assert self.updates(setup_of(tmp_path, "srft"), [7, 7, stale]) == [False]

    def test_the_second_update_of_a_rollout_is_not(self, tmp_path):
        """Both take stored log-probs, so that one program makes both."""
        assert self.updates(two_updates(setup_of(tmp_path, "srft")), [7, 7, 7]) == [False, False]

    def test_demonstrations_alone_are(self, tmp_path):
        setup = two_updates(setup_of(tmp_path, "sft"))
        groups = [made_group(setup, index, []) for index in range(2)]
        assert [update.batch.on_policy for update in updates_of(setup, groups)] == [True, True]
