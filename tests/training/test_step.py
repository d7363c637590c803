"""The train step: however the sequences are packed and split, the same gradients and metrics."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from made_sequences import made_sequence
from tiny_training import (
    MODEL,
    OBJECTIVES,
    OPTIONS,
    PREVIOUS_ENTROPY,
    ends_in_role,
    gradient_keeper,
    initial_state,
    largest,
    naive_logprobs,
    reference_params,
    sequences,
    split,
    step,
    target_logprobs,
)

from srft_jax.batch import Role
from srft_jax.config import TrainingConfig
from srft_jax.objectives.rows import make_batch
from srft_jax.ops.head import ReferencedStats
from srft_jax.training.metrics import present
from srft_jax.training.microbatch import FixedParams, StepInputs, make_loss_fn
from srft_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Sums over tokens, a reference, and every option that no preset takes; the others tell little more.
ALWAYS = ("srft", "sft_kl", "all else")
objectives = pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES],
)


def assert_same(got, expected):
    """Metrics, and gradients to 1e-5 of the largest entry of each parameter."""
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    leaves = jax.tree.leaves_with_path(expected[2])
    for (path, want), have in zip(leaves, jax.tree.leaves(got[2]), strict=True):
        tolerance = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance, err_msg=str(path))


def roles_of_microbatches(batch):
    trained = np.where(batch.rows.loss_mask, batch.rows.role, Role.NONE)
    roles = {Role.SELF, Role.DEMONSTRATION}
    return [roles & set(rows.flat) for rows in trained[: batch.num_microbatches]]


@objectives
def test_microbatch_splits_agree(name):
    """Eight ragged rows in 1, 2 and 4 microbatches, some of them without a demonstration."""
    batches = [split(name, rows) for rows in (8, 4, 2)]
    roles = [roles_of_microbatches(batch) for batch in batches]
    assert [len(one) for one in roles] == [1, 2, 4]
    assert roles[0] == [{Role.SELF, Role.DEMONSTRATION}]
    assert roles[1][1] == roles[2][2] == roles[2][3] == {Role.SELF}
    whole, *others = (step(name, batch) for batch in batches)
    assert np.isfinite(largest(whole[2])) and largest(whole[2]) > 1e-3
    for other in others:
        assert_same(other, whole)


def one_a_row(lengths, _):
    return [[index] for index in range(len(lengths))]


@objectives
def test_packed_equals_unpacked(name):
    packed, unpacked = split(name), split(name, pack_rows=one_a_row)
    assert packed.rows.segment_ids.max() > 1 == unpacked.rows.segment_ids.max()
    assert_same(step(name, packed), step(name, unpacked))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["srft", "all else"])
def test_long_rows_of_rollouts_and_demonstrations_equal_one_sequence_a_row(name):
    """Lengths with a long tail; who wrote a demonstration may have given its log-probs."""
    random = np.random.default_rng(3)
    made = []
    for number, size in enumerate(random.lognormal(3.0, 0.9, 16).clip(1, 200).astype(int)):
        role = Role.DEMONSTRATION if number % 4 == 3 else Role.SELF
        tokens = random.integers(1, MODEL.vocab_size, 12 + size).tolist()
        old = None if number == 3 else random.uniform(-4.5, -2.5, size).tolist()
        advantage = [0.75, -0.25, 0.0, -0.5][number % 3]
        made.append(made_sequence(tokens[:12], tokens[12:], role, advantage, advantage > 0, old))
    training = TrainingConfig(row_length=256, rows_per_microbatch=16)
    make = functools.partial(
        make_batch, made, OBJECTIVES[name], training, num_microbatches=1, length_cap=200
    )
    packed, unpacked = make(), make(pack_rows=one_a_row)
    assert packed.rows.segment_ids.max() > 3 > unpacked.rows.segment_ids.max()
    both = {Role.SELF, Role.DEMONSTRATION}
    assert any(both <= set(row) for row in packed.rows.role[0].tolist())
    assert_same(step(name, packed), step(name, unpacked))


@objectives
@pytest.mark.parametrize("kept", [[], [Role.SELF], [Role.DEMONSTRATION]])
def test_a_step_without_a_role_is_finite(name, kept):
    batch = split(name, kept=[row for row in sequences() if ends_in_role(row, *kept)])
    state, metrics, gradient = step(name, batch)
    assert all(np.isfinite(x) for x in metrics.values())
    assert np.isfinite(largest(gradient))
    objective = OBJECTIVES[name]
    if not kept:
        assert largest(gradient) == metrics["loss/total"] == 0
    elif objective.trains_demonstrations and objective.self_form != "none":
        assert largest(gradient) > 1e-3
    # What is not there is not reported, and leaves the running entropy alone.
    shown = present(metrics, batch.normalisers, objective)
    assert ("policy/entropy_self" in shown) == (Role.SELF in kept)
    assert ("weights/sft" in shown) == (Role.DEMONSTRATION in kept)
    carried = (state.entropy_self, state.entropy_demonstration)
    roles = (Role.SELF, Role.DEMONSTRATION)
    for value, before, role in zip(carried, PREVIOUS_ENTROPY, roles, strict=True):
        assert (value == np.float32(before)) == (role not in kept)


def test_unused_microbatches_are_not_computed():
    """Whatever lies beyond the number of used microbatches has no influence."""
    batch = split("srft")
    before = step("srft", batch)
    for field in dataclasses.fields(batch.rows):
        values = getattr(batch.rows, field.name)
        values[1:] = values[0]
    assert_same(step("srft", batch), before)
    doubled = step("srft", dataclasses.replace(batch, num_microbatches=np.int32(2)))
    np.testing.assert_allclose(doubled[1]["loss/total"], 2 * before[1]["loss/total"], rtol=1e-5)


@pytest.mark.slow
def test_on_policy_equals_old_logprobs_that_are_our_own():
    batch = split("srft")
    off_policy, computed = step("srft", batch), step("srft", batch, on_policy=True)
    logprob = target_logprobs(naive_logprobs(batch, initial_state().params), batch)
    self_tokens = batch.rows.loss_mask[0] & (batch.rows.role[0] == Role.SELF)
    batch.rows.old_logprobs[0] = np.where(self_tokens, logprob, 0.0)
    with_logprobs = step("srft", batch)
    # The same temperature on both sides, or the ratios would not be 1.
    assert with_logprobs[1]["policy/clip_fraction"] == 0 < off_policy[1]["policy/clip_fraction"]
    assert computed[1]["policy/ratio_min"] == computed[1]["policy/ratio_max"] == 1.0
    assert_same(computed, with_logprobs)
    difference = jax.tree.map(lambda a, b: a - b, with_logprobs[2], off_policy[2])
    assert largest(difference) > 1e-3


def test_state_after_a_step():
    batch = split("all else")
    state, metrics, _ = step("all else", batch)
    assert state.step == initial_state().step + 1
    assert state.entropy_self == metrics["policy/entropy_self"]
    assert state.entropy_demonstration == metrics["policy/entropy_demo"]
    # Batch-scoped weights read the entropies that came with the state.
    expected = np.array([0.7, 1.3]) * 0.5 * np.exp(PREVIOUS_ENTROPY[1])
    actual = [metrics["weights/sft_min"], metrics["weights/sft_max"]]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    expected = np.array([0.7, 1.3]) * 0.1 * np.exp(-PREVIOUS_ENTROPY[0])
    actual = [metrics["weights/rl_min"], metrics["weights/rl_max"]]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_each_optimizer_has_a_state_of_its_own():
    keeper = gradient_keeper()
    both = {"policy": {}, "demonstration": keeper.init(initial_state().params)}
    state = dataclasses.replace(initial_state(), optimizer_states=both)
    train_step = make_train_step(
        OPTIONS, OBJECTIVES["srft"], keeper, optimizer_name="demonstration"
    )
    after, _ = train_step.eval_shape(state, split("srft"))
    states = after.optimizer_states
    assert states["policy"] == {} and states["demonstration"].keys() == state.params.keys()


def with_nan(batch, microbatch=1):
    """The completions of one microbatch have advantages that are not numbers."""
    self_tokens = batch.rows.loss_mask[microbatch] & (batch.rows.role[microbatch] == Role.SELF)
    batch.rows.advantage[microbatch][self_tokens] = np.nan
    return batch


def test_an_update_that_is_not_finite_is_skipped():
    """Whatever the state is made of stays bit for bit, but for the step."""
    before = jax.device_get(initial_state())
    state, metrics, _ = step("srft", with_nan(split("srft", rows_per_microbatch=4)))
    assert metrics["loss/skipped"] == 1 and step("srft", split("srft"))[1]["loss/skipped"] == 0
    assert np.isnan([metrics["loss/self"], metrics["loss/gradient_norm"]]).all()
    assert np.isfinite([metrics["loss/demo_nll"], metrics["policy/entropy_self"]]).all()
    assert state.step == before.step + 1
    kept = dataclasses.replace(state, step=before.step)
    for leaf, expected in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True):
        assert leaf.tobytes() == expected.tobytes()


def test_a_kl_needs_a_reference():
    train_step = make_train_step(OPTIONS, OBJECTIVES["sft_kl"], gradient_keeper())
    with pytest.raises(ValueError, match="kl = 0.2 .* no reference_params"):
        train_step(initial_state(), split("sft_kl"))


@pytest.mark.parametrize(("name", "is_used"), [("sft_kl", True), ("srft", False)])
def test_only_a_kl_pays_for_the_reference(name, is_used):
    """A run has one reference, also in a stage of plain SFT: there it has no forward pass."""
    loss_fn = make_loss_fn(OPTIONS, OBJECTIVES[name])
    inputs = StepInputs(initial_state(), split(name), FixedParams(reference=reference_params()))
    _, tokens = jax.eval_shape(loss_fn, initial_state().params, inputs, 0)
    assert isinstance(tokens.stats, ReferencedStats) == is_used
