"""The train step: however the sequences are packed and split, the same gradients and metrics."""

import dataclasses
import functools

import jax
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
from srft_jax.objectives import rows as rows_module
from srft_jax.objectives.methods import PRESETS, expand
from srft_jax.training.step import make_train_step, present

SHAPE = (4, 6)  # microbatches, rows
TEMPERATURE = 0.8
# Each option that the presets leave out, in one row.
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
def compiled(objective, on_policy):
    return make_train_step(
        MODEL, objective, gradient_keeper(), temperature=TEMPERATURE, on_policy=on_policy
    )


def step(name, batch, on_policy=False, **changes):
    """State, metrics and gradient after one step from the initial state."""
    state = dataclasses.replace(initial_state(), **changes)
    with jax.default_matmul_precision("highest"):
        state, metrics = compiled(OBJECTIVES[name], on_policy)(state, batch)
    state, metrics = jax.device_get((state, metrics))
    return state, metrics, state.optimizer_states["policy"]


def split(name, rows_per_microbatch, of=None):
    return batch_of(of or sequences(), OBJECTIVES[name], rows_per_microbatch, SHAPE)


def assert_same(got, expected):
    """Metrics and gradients to 1e-5 of the largest entry of each parameter."""
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    paths = jax.tree_util.tree_leaves_with_path(expected[2])
    for (path, want), have in zip(paths, jax.tree.leaves(got[2]), strict=True):
        tolerance = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance, err_msg=str(path))


def largest(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


@objectives
def test_microbatch_splits_agree(name):
    """Six rows in 1, 2 and 4 microbatches; the last holds no demonstration, and nothing is NaN."""
    batches = {rows: split(name, rows) for rows in (6, 4, 2)}
    used = [int(batch.num_microbatches) for batch in batches.values()]
    assert used == [1, 2, 3]
    for batch in list(batches.values())[1:]:
        trained = np.where(batch.rows.loss_mask, batch.rows.role, 0)
        with_demonstration = [
            Role.DEMONSTRATION in rows for rows in trained[: batch.num_microbatches]
        ]
        assert with_demonstration[0] and not with_demonstration[-1]
    whole, *others = (step(name, batch) for batch in batches.values())
    assert np.isfinite(largest(whole[2])) and largest(whole[2]) > 1e-3
    for other in others:
        assert_same(other, whole)


@objectives
def test_packed_equals_unpacked(name, monkeypatch):
    packed = split(name, 6)
    monkeypatch.setattr(rows_module, "pack", lambda lengths, _: [[i] for i in range(len(lengths))])
    unpacked = split(name, 6)
    assert packed.rows.segment_ids.max() > 1 == unpacked.rows.segment_ids.max()
    assert_same(step(name, packed), step(name, unpacked))


def test_unused_microbatches_are_not_computed():
    """Whatever lies beyond the number of used microbatches has no influence."""
    batch = split("srft", 6)
    before = step("srft", batch)
    for field in dataclasses.fields(batch.rows):
        values = getattr(batch.rows, field.name)
        values[1:] = values[0]
    assert_same(step("srft", batch), before)
    doubled = dataclasses.replace(batch, num_microbatches=np.int32(2))
    assert abs(step("srft", doubled)[1]["loss/demo_nll"] / before[1]["loss/demo_nll"] - 2) < 1e-4
