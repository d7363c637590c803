"""The schedule, the clip, and which parameters decay."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from tiny_training import MODEL

from srft_jax.config import OptimizerConfig, TrainingConfig
from srft_jax.models import init_params
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.stages import make_stages
from srft_jax.training.optimizer import learning_rate, make_optimizer, make_optimizers

NOT_MATRICES = {
    "attention_norm", "mlp_norm", "final_norm", "query_bias", "key_bias", "value_bias",
}  # fmt: skip


def rates(steps, **settings):
    schedule = learning_rate(OptimizerConfig(learning_rate=2.0, **settings), num_updates=50)
    return [float(schedule(step)) for step in steps]


def test_warmup_is_linear_and_then_constant():
    actual = rates([0, 1, 4, 9, 10, 50], warmup_steps=10)
    np.testing.assert_allclose(actual, [0.2, 0.4, 1, 2, 2, 2], rtol=1e-6)


def test_cosine_ends_at_its_fraction_with_the_last_update():
    actual = rates([0, 4, 10, 30, 50, 60], warmup_steps=10, schedule="cosine", final_fraction=0.1)
    np.testing.assert_allclose(actual, [0.2, 1, 2, (2 + 0.2) / 2, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warmup_the_first_step_is_at_the_peak(schedule):
    assert rates([0], warmup_steps=0, schedule=schedule) == [2.0]


def test_a_warmup_longer_than_the_run_is_no_error():
    actual = rates([0, 49], warmup_steps=100, schedule="cosine")
    np.testing.assert_allclose(actual, [0.02, 1.0], rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_decay_touches_matrices_only(tied):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config, model, num_updates=1)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    leaves = {path[-1].key: update for path, update in jax.tree.leaves_with_path(updates)}
    assert leaves.keys() > NOT_MATRICES and ("head" in leaves) == (not tied)
    for name, update in leaves.items():
        expected = 0.0 if name in NOT_MATRICES else -0.5 * 0.1
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("size", "seen"), [(10.0, 2.0), (1.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(size, seen):
    config = OptimizerConfig(warmup_steps=0, b1=0.9, clip_norm=2.0)
    optimizer = make_optimizer(config, MODEL, num_updates=1)
    shapes = jax.eval_shape(lambda key: init_params(MODEL, key), jax.random.key(0))
    gradient = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    scale = size / float(optax.tree.norm(gradient))
    gradient = jax.tree.map(lambda x: x * np.float32(scale), gradient)
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(gradient), gradient)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1 * seen, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "num_updates"),
    [
        ("grpo", {"policy": 20}),
        ("sft_rl", {"policy": 14, "demonstration": 6}),
        ("relift", {"policy": 20, "demonstration": 10 * 64 // 128}),
    ],
)
def test_each_cosine_ends_with_its_optimizers_last_update(preset, num_updates):
    """Ten steps of two updates and 64 prompts; the first stage has three of them."""
    objective = PRESETS[preset]
    if objective.sft_steps:
        objective = dataclasses.replace(objective, sft_steps=3)
    stages = make_stages(
        objective,
        num_steps=10,
        prompts_per_step=64,
        updates_per_rollout=2,
        completions_per_prompt=4,
    )
    cosine = OptimizerConfig(warmup_steps=0, schedule="cosine", final_fraction=0.0)
    training = TrainingConfig(
        num_steps=10, updates_per_rollout=2, optimizer=cosine, demonstration_optimizer=cosine
    )
    optimizers = make_optimizers(training, stages, MODEL)
    assert optimizers.transformations.keys() == num_updates.keys()
    for name, last in num_updates.items():
        rate = optimizers.learning_rates[name]
        assert rate(last) < 1e-8 < rate(last - 1)
