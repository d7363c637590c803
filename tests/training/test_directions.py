"""AdamW, Adafactor and Muon: first updates in closed form, layer by layer, and what they keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from tiny_training import MODEL

from srft_jax.config import LoraConfig, OptimizerConfig
from srft_jax.models import init_params, lora
from srft_jax.ops.rounding import stochastic_round
from srft_jax.training.moments import stored_as
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state, state_shardings

# Matrices of 128 rows and columns at least, which Adafactor factors.
WIDE = dataclasses.replace(MODEL, vocab_size=160, dim=128, head_dim=32, num_kv_heads=4, mlp_dim=192)
NAMES = ["adamw", "adafactor", "muon"]
RATE = 0.5

pytestmark = pytest.mark.usefixtures("quick_compilation")


def optimizer_of(name, model=WIDE, **settings):
    settings = dict(learning_rate=RATE, warmup_steps=0, clip_norm=1e9) | settings
    return make_optimizer(OptimizerConfig(name=name, **settings), model, num_updates=1000)


@functools.cache
def random_params(seed, model=WIDE):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


@functools.cache
def update_of(name):
    """Compiled once."""
    return jax.jit(optimizer_of(name).update)


@functools.cache
def first_update(name, scale_of_last_layer=1.0):
    """Random gradients, and the update that they make."""
    params, gradient = random_params(0), random_params(1)
    layers = jax.tree.map(np.copy, gradient["layers"])
    for layer in layers.values():
        layer[-1] *= scale_of_last_layer
    state, gradient = optimizer_of(name).init(params), gradient | {"layers": layers}
    with jax.default_matmul_precision("highest"):
        return gradient, update_of(name)(gradient, state, params)[0]


def test_adamw_steps_by_the_sign():
    gradient, update = first_update("adamw")
    for g, u in zip(jax.tree.leaves(gradient), jax.tree.leaves(update), strict=True):
        np.testing.assert_allclose(u, -RATE * g / (np.abs(g) + 1e-8), rtol=1e-4)


def test_adafactor_divides_by_the_means_of_rows_and_columns():
    """Its decay is 0 at first: the second moment is that of the gradient at hand."""
    gradient, update = first_update("adafactor")
    assert all(min(gradient["layers"][name].shape[1:]) >= 128 for name in ("query", "gate"))
    for name in ("query", "gate", "output"):
        for g, u in zip(gradient["layers"][name], update["layers"][name], strict=True):
            rows, columns = (g**2).mean(1), (g**2).mean(0)
            expected = g / np.sqrt(np.outer(rows, columns) / rows.mean())
            expected /= max(1.0, np.sqrt((expected**2).mean()))
            np.testing.assert_allclose(u, -RATE * expected, rtol=1e-4, atol=1e-5)
    norm = gradient["layers"]["mlp_norm"]  # vectors are not factored
    np.testing.assert_allclose(update["layers"]["mlp_norm"], -RATE * np.sign(norm), rtol=1e-5)


def test_muon_makes_the_matrices_of_blocks_orthogonal():
    """Newton-Schulz leaves singular values between about 0.7 and 1.2."""
    gradient, update = first_update("muon")
    for name in ("gate", "down"):  # of square ones the least singular values are next to 0
        for g, u in zip(gradient["layers"][name], update["layers"][name], strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            scaled = -u / (RATE * 0.2 * max(g.shape) ** 0.5)
            values = np.linalg.svd(scaled, compute_uv=False)
            assert 0.6 < values.min() and values.max() < 1.3, name
            assert np.trace(scaled.T @ (left @ right)) / len(values) > 0.8, name  # its own bases
            rms = np.sqrt((u**2).mean()) / RATE
            assert 0.15 < rms < 0.25, name  # AdamW's, so that learning rates are alike
    for name in ("embedding", "final_norm"):
        adam = gradient[name] / (np.abs(gradient[name]) + 1e-8)
        np.testing.assert_allclose(update[name], -RATE * adam, rtol=1e-4)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_layers_are_matrices_of_their_own(name):
    """A stacked array as one matrix would make a layer's step depend on the others' gradients."""
    before, after = (first_update(name, scale)[1]["layers"] for scale in (1.0, 100.0))
    for key in ("query", "down", "mlp_norm"):
        np.testing.assert_allclose(after[key][0], before[key][0], rtol=1e-5, err_msg=key)
        np.testing.assert_allclose(after[key][1], before[key][1], rtol=1e-3, atol=1e-4)  # of scale


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "dtype", "low", "high"),
    [
        ("adamw", "float32", 8.0, 8.01),
        ("adamw", "bfloat16", 4.0, 4.01),
        ("muon", "float32", 4.2, 4.8),  # two moments of the embedding alone
        ("muon", "bfloat16", 2.1, 2.4),
        ("adafactor", "float32", 0.05, 0.2),
    ],
)
def test_bytes_of_state_per_parameter(name, dtype, low, high):
    optimizer, params = optimizer_of(name, state_dtype=dtype), random_params(0)
    state = jax.eval_shape(optimizer.init, params)
    ratio = num_bytes(state) / sum(x.size for x in jax.tree.leaves(params))
    assert low <= ratio <= high


MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def specs(name, model=WIDE, **settings):
    optimizers = {"policy": optimizer_of(name, model, **settings)}
    params = lora.trained(random_params(0, model), model)
    shapes = jax.eval_shape(lambda: new_state(params, optimizers))
    places = state_shardings(model, optimizers, MESH)
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
    leaves = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(places), strict=True)
    return {jax.tree_util.keystr(path): (leaf.shape, where.spec) for (path, leaf), where in leaves}


def entry(specs, *parts):
    """The one whose key has all of these parts."""
    (value,) = [value for key, value in specs.items() if all(part in key for part in parts)]
    return value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_split_as_their_parameters(dtype):
    whole = PartitionSpec(None, "fsdp", "tensor")
    adamw = specs("adamw", state_dtype=dtype)
    for moment in (".mu", ".nu"):
        assert entry(adamw, moment, "['gate']") == ((2, 128, 192), whole)
    muon = specs("muon", state_dtype=dtype)
    assert entry(muon, ".mu", "['gate']") == ((2, 128, 192), whole)
    assert entry(muon, ".nu", "['embedding']") == ((160, 128), PartitionSpec("tensor", "fsdp"))
    assert not [key for key in muon if ".nu" in key and "gate" in key]
    adafactor = specs("adafactor", state_dtype=dtype)
    assert entry(adafactor, ".v_row", "['gate']") == ((2, 128), PartitionSpec(None, "fsdp"))
    assert entry(adafactor, ".v_col", "['gate']") == ((2, 192), PartitionSpec(None, "tensor"))
    assert entry(adafactor, ".v_row", "['down']") == ((2, 128), PartitionSpec(None, "fsdp"))
    assert entry(adafactor, ".v_row", "['embedding']") == ((128,), PartitionSpec("fsdp"))


def test_adapters_have_states_of_their_own():
    adapted = lora.adapted(WIDE, LoraConfig(rank=2, targets=("query",)))
    for name in NAMES:
        layer_keys = [key for key in specs(name, adapted) if "['layers']" in key]
        assert any("query_lora_a" in key for key in layer_keys)
        assert all("query_lora" in key for key in layer_keys if "optimizer_states" in key)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_lead_to_the_target(name):
    settings = dict(learning_rate=0.1, state_dtype="bfloat16", weight_decay=1e-3)
    optimizer = optimizer_of(name, MODEL, **settings)
    params, target = random_params(0, MODEL), random_params(1, MODEL)

    def loss(params):
        return sum(((a - b) ** 2).mean() for a, b in _pairs(params, target))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = float(loss(params)), optimizer.init(params)
    kinds = jax.tree.map(lambda x: x.dtype, state)
    for _ in range(10):
        params, state = step(params, state)
    assert float(loss(params)) < 0.6 * before
    assert jax.tree.map(lambda x: x.dtype, state) == kinds  # or the next step would compile again


def _pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_rounding_by_chance_is_right_on_average():
    values = np.asarray([1.002, -3.3, 0.0, 1e-30, 65504.0, 1.0], np.float32)
    x = jnp.tile(values, (20_000, 1))
    rounded = np.asarray(jax.jit(stochastic_round)(x, jax.random.key(0)), np.float64)
    np.testing.assert_allclose(rounded.mean(0), values, rtol=1e-4)
    assert [len(set(column)) for column in rounded.T] == [2, 2, 1, 2, 2, 1]
    assert (np.abs(rounded - values) < np.abs(values) * 2**-7 + 1e-38).all()


def test_a_slow_average_in_bfloat16_still_moves():
    """By a thousandth an update, a quarter of what nearest rounding sees."""
    optimizer = stored_as("bfloat16", optax.scale_by_adam(b2=0.999))
    zeros = {"a": jnp.zeros(4096)}
    ones = {"a": jnp.ones(4096, jnp.bfloat16)}
    state, update = optax.tree.set(optimizer.init(zeros), nu=ones), jax.jit(optimizer.update)
    for _ in range(100):
        _, state = update(zeros, state, zeros)
    moment = optax.tree.get(state, "nu")["a"]
    assert moment.dtype == jnp.bfloat16
    assert abs(float(np.asarray(moment, np.float32).mean()) - 0.999**100) < 0.01
