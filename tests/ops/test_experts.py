"""Experts in tiles against all tokens through all experts, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.ops.experts import (
    ExpertOptions,
    ExpertParams,
    assign_tiles,
    expert_mlp,
    tile_size,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

D, F = 6, 5


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def problem(num_tokens, num_experts, favourite=0.0):
    """With a `favourite`, nearly all tokens choose expert 0 and no token chooses some others."""
    rng = np.random.default_rng(num_tokens)
    shapes = (D, num_experts), (num_experts, D, F), (num_experts, D, F), (num_experts, F, D)
    router, gate, up, down = (rng.normal(size=s).astype(np.float32) for s in shapes)
    x = rng.normal(size=(num_tokens, D)).astype(np.float32)
    x[:, 0] = np.abs(x[:, 0]) + 1
    router[0, 0] += favourite
    return jnp.asarray(x), ExpertParams(router, gate, up, down)


def dense(x, params, options):
    """Every token through every expert, weighted by what the router gives it, mostly 0."""
    probabilities = jax.nn.softmax(x @ params.router, axis=-1)
    lowest = jnp.sort(probabilities, axis=-1)[:, -options.experts_per_token, None]
    weights = jnp.where(probabilities >= lowest, probabilities, 0.0)
    if options.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    middle = options.activation(jnp.einsum("nd,edf->nef", x, params.gate))
    middle = middle * jnp.einsum("nd,edf->nef", x, params.up)
    return jnp.einsum("nef,efd,ne->nd", middle, params.down, weights)


def with_gradients(function, *inputs):
    def total(*inputs):
        out = function(*inputs)
        return jnp.mean(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*inputs)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "per_token", "favourite"),
    [
        (40, 4, 2, 0.0),
        pytest.param(40, 4, 2, 9.0, marks=pytest.mark.slow),
        (1, 16, 4, 0.0),
        pytest.param(300, 3, 1, 0.0, marks=pytest.mark.slow),
    ],
)
def test_experts_and_their_gradients_equal_those_of_all(
    num_tokens, num_experts, per_token, favourite
):
    """Balanced, one-sided, fewer tokens than experts, several full tiles."""
    options = ExpertOptions(per_token, num_tokens % 2 == 0, jax.nn.silu)
    inputs = problem(num_tokens, num_experts, favourite)
    got, want = (
        with_gradients(functools.partial(f, options=options), *inputs) for f in (expert_mlp, dense)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_places_follow_the_experts():
    places, tiles = assign_tiles(jnp.array([1, 0, 1, 3, 1]), num_experts=4, size=2)
    assert places.tolist() == [2, 0, 3, 6, 4]  # one tile of expert 0, two of 1, none of 2, one of 3
    assert tiles.experts[: int(tiles.in_use)].tolist() == [0, 1, 1, 3]


def test_work_grows_with_tokens_and_not_with_experts():
    """The loop's body takes one tile through one expert, whatever the number of experts."""

    def dots(num_experts):
        inputs = problem(64, num_experts)
        options = ExpertOptions(2, True, jax.nn.silu)
        program = jax.make_jaxpr(functools.partial(expert_mlp, options=options))(*inputs)
        return str(program).count(f"f32[{num_experts},{D},{F}] = dot_general"), str(program)

    for num_experts in (8, 64):
        products, program = dots(num_experts)
        assert products == 0 and program.count("while[") == 3
        size = tile_size(128, num_experts)
        assert f"f32[{size},{F}] = dot_general" in program


def test_experts_of_bfloat16():
    options = ExpertOptions(2, True, jax.nn.silu)
    x, params = problem(40, 4)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (x, params))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    out = jax.jit(expert_mlp, static_argnums=2)(*rounded, options)
    exact = jax.jit(dense, static_argnums=2)(*wide, options)
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(np.float32) - exact).max() < 2**-5 * np.abs(exact).max()
