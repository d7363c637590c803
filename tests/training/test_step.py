"""The train step: however the sequences are packed and split, the same gradients and metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import (
    MODEL,
    PREVIOUS_ENTROPY,
    batch_of,
    gradient_keeper,
    sequences,
    state_of,
)

from srft_jax.batch import Role
from srft_jax.config import ObjectiveConfig
from srft_jax.models import forward, output_head
from srft_jax.objectives import rows as rows_module
from srft_jax.objectives.methods import PRESETS, expand
from srft_jax.training.step import make_train_step, present

SHAPE = (4, 8)  # microbatches, rows
TEMPERATURE = 0.8
# The options that no preset takes, in one row.
ALL_ELSE = dict(
    demo_nll_entropy=1,
    self_positive_entropy=-1,
    entropy_scope="batch",
    entropy_bonus=0.01,
    demo_aggregation="sequences",
    policy_aggregation="sequences",
)
OBJECTIVES = {name: expand(ObjectiveConfig(preset=name)) for name in PRESETS}
OBJECTIVES["all else"] = expand(ObjectiveConfig(**ALL_ELSE))
objectives = pytest.mark.parametrize("name", OBJECTIVES)


@functools.cache
def initial_state():
    return state_of(gradient_keeper())


@functools.cache
def compiled(name, on_policy):
    return make_train_step(
        MODEL, OBJECTIVES[name], gradient_keeper(), temperature=TEMPERATURE, on_policy=on_policy
    )


def step(name, batch, on_policy=False):
    """New state, metrics and gradient after one step from the initial state."""
    with jax.default_matmul_precision("highest"):
        state, metrics = jax.device_get(compiled(name, on_policy)(initial_state(), batch))
    return state, metrics, state.optimizer_states["policy"]


def split(name, rows_per_microbatch=8, of=None):
    of = sequences() if of is None else of
    return batch_of(of, OBJECTIVES[name], rows_per_microbatch, SHAPE)


def assert_same(got, expected):
    """Metrics, and gradients to 1e-5 of the largest entry of each parameter."""
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    leaves = jax.tree.leaves_with_path(expected[2])
    for (path, want), have in zip(leaves, jax.tree.leaves(got[2]), strict=True):
        tolerance = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance, err_msg=str(path))


def largest(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


def roles_of_microbatches(batch):
    trained = np.where(batch.rows.loss_mask, batch.rows.role, Role.NONE)
    return [set(rows.flat) - {Role.NONE} for rows in trained[: batch.num_microbatches]]


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


@objectives
def test_packed_equals_unpacked(name, monkeypatch):
    packed = split(name)
    monkeypatch.setattr(rows_module, "pack", lambda lengths, _: [[i] for i in range(len(lengths))])
    unpacked = split(name)
    assert packed.rows.segment_ids.max() > 1 == unpacked.rows.segment_ids.max()
    assert_same(step(name, packed), step(name, unpacked))


@objectives
@pytest.mark.parametrize("kept", [[], [Role.SELF], [Role.DEMONSTRATION]])
def test_a_step_without_a_role_is_finite(name, kept):
    batch = split(name, of=[one for one in sequences() if one.role in kept])
    state, metrics, gradient = step(name, batch)
    assert all(np.isfinite(x) for x in metrics.values())
    assert np.isfinite(largest(gradient))
    objective = OBJECTIVES[name]
    if not kept:
        assert largest(gradient) == metrics["loss/total"] == 0
    elif objective.uses_demonstrations and objective.self_form != "none":
        assert largest(gradient) > 1e-3
    # What is not there is not reported, and leaves the running entropy alone.
    shown = present(metrics, batch.normalisers)
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


@functools.partial(jax.jit, static_argnames="temperature")
def naive_stats(params, rows, temperature):
    """logprob and entropy [B, T] from all logits."""
    hidden = forward(params, MODEL, rows.tokens, rows.positions, rows.segment_ids).hidden
    logp = jax.nn.log_softmax(hidden @ output_head(params, MODEL) / temperature)
    logprob = jnp.take_along_axis(logp, rows.targets[..., None], axis=-1)[..., 0]
    return logprob, -(jnp.exp(logp) * logp).sum(axis=-1)


def stats_of(batch, temperature=TEMPERATURE):
    """Of the first microbatch, under the initial parameters."""
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    with jax.default_matmul_precision("highest"):
        return rows, *jax.device_get(naive_stats(initial_state().params, rows, temperature))


def test_on_policy_equals_old_logprobs_that_are_our_own():
    batch = split("srft")
    off_policy, computed = step("srft", batch), step("srft", batch, on_policy=True)
    rows, logprob, _ = stats_of(batch)
    own = rows.loss_mask & (rows.role == Role.SELF)
    batch.rows.old_logprobs[0] = np.where(own, logprob, 0.0)
    given = step("srft", batch)
    # The same temperature on both sides, or the sampler would look off policy.
    assert abs(given[1]["policy/sampler_kl"]) < 1e-6 < off_policy[1]["policy/sampler_kl"]
    assert given[1]["policy/clip_fraction"] == 0 < off_policy[1]["policy/clip_fraction"]
    assert computed[1].pop("policy/sampler_kl") == off_policy[1]["policy/sampler_kl"]
    del given[1]["policy/sampler_kl"]
    assert_same(computed, given)
    difference = jax.tree.map(lambda a, b: a - b, given[2], off_policy[2])
    assert largest(difference) > 1e-3


def test_metrics_are_what_they_are_called():
    batch = split("srft")
    _, metrics, gradient = step("srft", batch)
    rows, logprob, entropy = stats_of(batch)
    own, demo = (rows.loss_mask & (rows.role == role) for role in (Role.SELF, Role.DEMONSTRATION))
    ratio, advantage = np.exp(logprob - rows.old_logprobs)[own], rows.advantage[own]
    clipped = np.where(advantage > 0, ratio > 1.2, (advantage < 0) & (ratio < 0.8))
    expected = {
        "policy/entropy_self": entropy[own].mean(),
        "policy/entropy_demo": entropy[demo].mean(),
        "policy/logprob_demo": logprob[demo].mean(),
        "policy/sampler_kl": (ratio - 1 - np.log(ratio)).mean(),
        "policy/clip_fraction": clipped.mean(),
        "weights/sft": (0.5 * np.exp(-entropy[demo])).mean(),
        "weights/rl": (0.1 * np.exp(entropy[own])).mean(),
        "loss/demo_nll": (0.5 * np.exp(-entropy[demo]) * -logprob[demo]).mean(),
        "loss/gradient_norm": np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient))),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics.pop(name), value, rtol=1e-4, err_msg=name)
    total = metrics.pop("loss/total")
    assert metrics.keys() == {"loss/demo_policy", "loss/self"}
    np.testing.assert_allclose(expected["loss/demo_nll"] + sum(metrics.values()), total, rtol=1e-4)


def test_state_after_a_step():
    batch = split("all else")
    state, metrics, _ = step("all else", batch)
    assert state.step == initial_state().step + 1
    assert state.entropy_self == metrics["policy/entropy_self"]
    assert state.entropy_demonstration == metrics["policy/entropy_demo"]
    # Batch-scoped weights read the entropies that came with the state.
    np.testing.assert_allclose(metrics["weights/sft"], 0.5 * np.exp(PREVIOUS_ENTROPY[1]), rtol=1e-5)
    np.testing.assert_allclose(metrics["weights/rl"], 0.1 * np.exp(-PREVIOUS_ENTROPY[0]), rtol=1e-5)
