"""The train step with adapters: nothing of the base is changed, or differentiated."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny_training import MODEL, OBJECTIVES, OPTIONS, split

from srft_jax.batch import TrainState
from srft_jax.config import LoraConfig, OptimizerConfig
from srft_jax.models import families, init_params, lora
from srft_jax.training.microbatch import FixedParams
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

# No two sizes are equal, and none is that of rows, tokens or microbatches.
SIZES = dataclasses.replace(MODEL, dim=20, mlp_dim=36, head_dim=6, vocab_size=40)
ADAPTED = lora.adapted(SIZES, LoraConfig(rank=2, alpha=4.0))
OPTIMIZER = make_optimizer(
    OptimizerConfig(learning_rate=0.05, warmup_steps=0, weight_decay=0.1), ADAPTED, num_updates=9
)


def random_params():
    """B is 0, all else random."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(ADAPTED, jax.random.key(0)))

    def draw(path, x):
        std = 0.0 if path[-1].key.endswith("_lora_b") else 0.3
        return random.normal(0.0, std, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


PARAMS = random_params()
BASE, ADAPTERS = lora.frozen(PARAMS, ADAPTED), lora.trained(PARAMS, ADAPTED)


def state_of(params, optimizer):
    zero = np.float32(0.0)
    return TrainState(np.int32(0), params, {"policy": optimizer.init(params)}, zero, zero)


def make_step(name, model=ADAPTED, optimizer=OPTIMIZER):
    options = dataclasses.replace(OPTIONS, model_config=model)
    return make_train_step(options, OBJECTIVES[name], optimizer)


@pytest.mark.slow
def test_steps_change_adapters_alone():
    """The base is the reference too: at first the policy is the reference, then no longer."""
    base = jax.device_put(BASE)
    step, fixed = make_step("sft_kl"), FixedParams(base, base)
    state = jax.device_put(state_of(ADAPTERS, OPTIMIZER))
    batch, kl = split("sft_kl"), []
    for _ in range(3):
        state, metrics = step(state, batch, fixed)
        kl.append(float(metrics["policy/reference_kl"]))
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-3
    for leaf, before in zip(jax.tree.leaves(base), jax.tree.leaves(BASE), strict=True):
        assert np.asarray(leaf).tobytes() == before.tobytes()
    assert jax.tree.structure(state.params) == jax.tree.structure(ADAPTERS)
    for path, leaf in jax.tree.leaves_with_path(state.params):
        before = ADAPTERS["layers"][path[-1].key]
        assert np.abs(leaf - before).max(axis=(1, 2)).min() > 1e-3, path


def products(step, *inputs):
    """Shapes, the smaller size first, of all products and scatters of a step, loops included."""
    text = str(step.trace(*inputs).jaxpr)
    results = re.findall(r":f32\[([\d,]+)\] = (?:dot_general|scatter-add)", text)
    return {tuple(sorted(map(int, shape.split(",")))) for shape in results}


def shapes(config, is_adapter):
    """Shapes of all matrices of the table, the smaller size first."""
    matrices = [
        parameter
        for parameter in families.parameters(config)
        if len(parameter.axes) == 2 and parameter.is_adapter == is_adapter
    ]
    return {tuple(sorted(families.shape(matrix, config))) for matrix in matrices}


@pytest.mark.parametrize("name", ["srft", "gspo"])  # the head's gradient in one sweep, and in two
def test_no_gradient_has_the_shape_of_a_frozen_matrix(name):
    """Embedding and head, which are one matrix here, have no gradient either."""
    batch, optimizer = split(name), make_optimizer(OptimizerConfig(), SIZES, num_updates=9)
    whole = products(make_step(name, SIZES, optimizer), state_of(BASE, optimizer), batch)
    adapted = products(make_step(name), state_of(ADAPTERS, OPTIMIZER), batch, FixedParams(BASE))
    assert shapes(SIZES, is_adapter=False) <= whole
    assert not shapes(SIZES, is_adapter=False) & adapted
    assert shapes(ADAPTED, is_adapter=True) <= adapted
