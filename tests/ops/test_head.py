"""token_stats in tiles against a float64 truth and autodiff, never holding [N, V]."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.ops.head import TokenStats, token_stats
from srft_jax.ops.head_passes import HeadTileSizes

N, D, V = 13, 8, 300  # no tile of 128 columns divides V
WEIGHTS = (
    np.random.default_rng(9).normal(size=(2, N)).astype(np.float32)
)  # weights of logprob, entropy
PER_ROW = np.linspace(0.5, 2.0, N).astype(np.float32)
SETTINGS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "temperature per row": dict(temperature=PER_ROW),
    "softcap and temperature per row": dict(softcap=2.0, temperature=PER_ROW),
}


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def problem(num_rows=N, seed=0):
    """hidden [N, D], head [D, V], targets [N]; logits of about +-5."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(num_rows, D)).astype(np.float32)
    head = random.normal(size=(D, V)).astype(np.float32)
    return hidden, head, random.integers(0, V, num_rows).astype(np.int32)


def truth(hidden, head, targets, temperature=1.0, softcap=None):
    """[2, N] float64: logprob and entropy from all logits."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits / np.broadcast_to(temperature, len(targets))[:, None]
    highest = logits.max(axis=1, keepdims=True)
    logp = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
    return np.stack([logp[np.arange(len(targets)), targets], -(np.exp(logp) * logp).sum(axis=1)])


def naive(hidden, head, targets, *, mask, temperature=1.0, softcap=None):
    """`token_stats` from all logits in jax.numpy, for autodiff."""
    logits = hidden @ head
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logp = jax.nn.log_softmax(logits / jnp.reshape(jnp.asarray(temperature), (-1, 1)))
    logprob = jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0]
    entropy = -(jnp.exp(logp) * logp).sum(axis=1)
    return TokenStats(jnp.where(mask, logprob, 0.0), jnp.where(mask, entropy, 0.0))


@functools.cache
def compiled(function, softcap):
    """A program that returns stats [2, N], and gradients by hidden and head."""

    def weighted(hidden, head, targets, mask, temperature, weights):
        stats = function(hidden, head, targets, mask=mask, temperature=temperature, softcap=softcap)
        return jnp.sum(jnp.stack(stats) * weights), jnp.stack(stats)

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))


def evaluate(function, inputs, *, mask=None, temperature=1.0, softcap=None, most_rows=4):
    """Stats [2, N], and the gradients by hidden and head of their sum weighted by WEIGHTS."""
    hidden, head, targets = inputs
    num_rows = len(targets)
    mask = np.ones(num_rows, bool) if mask is None else mask
    run = compiled(in_tiles(most_rows) if function is token_stats else function, softcap)
    (_, stats), grads = run(*inputs, mask, temperature, WEIGHTS[:, :num_rows])
    return stats, grads


@functools.cache
def in_tiles(most_rows):
    """`token_stats` in small tiles."""
    sizes = HeadTileSizes(most_rows=most_rows, most_columns=128)
    return functools.partial(token_stats, tile_sizes=sizes)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_stats_equal_the_float64_truth(settings):
    inputs = problem()
    stats, _ = evaluate(token_stats, inputs, **settings)
    assert stats.dtype == jnp.float32
    np.testing.assert_allclose(stats, truth(*inputs, **settings), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_equal_autodiff_of_the_naive_head(settings):
    (_, ours), (_, want) = (evaluate(f, problem(), **settings) for f in (token_stats, naive))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, want)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_equal_finite_differences_of_the_truth(settings):
    hidden, head, targets = problem()
    _, grads = evaluate(token_stats, (hidden, head, targets), **settings)
    random, step = np.random.default_rng(5), 1e-5
    for moved, gradient in enumerate(grads):
        move, sides = random.normal(size=gradient.shape), []
        for sign in (1, -1):
            inputs = [hidden.astype(np.float64), head.astype(np.float64)]
            inputs[moved] += sign * step * move
            sides.append(np.sum(WEIGHTS * truth(*inputs, targets, **settings)))
        slope = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * move), slope, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("most_rows", [1, 4])
def test_row_tiles_change_nothing(most_rows):
    inputs = problem()
    whole, whole_grads = evaluate(token_stats, inputs, most_rows=N)
    stats, grads = evaluate(token_stats, inputs, most_rows=most_rows)
    np.testing.assert_allclose(stats, whole, rtol=1e-6, atol=1e-6)
    for got, want in zip(grads, whole_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def equations_of(jaxpr):
    """All equations, also those of nested programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations_of(inner)


def largest_array(function, *inputs):
    """Elements of the largest array that the traced function makes anywhere."""
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    return max(v.aval.size for e in equations_of(jaxpr) for v in e.outvars)


def test_no_array_of_all_logits_is_made():
    hidden, head, targets = problem(num_rows=64)
    mask, all_logits = np.ones(64, bool), 64 * V

    def gradient(function):
        def total(hidden, head):
            return sum(map(jnp.sum, function(hidden, head, targets, mask=mask)))

        return jax.grad(total, argnums=(0, 1))

    assert largest_array(gradient(naive), hidden, head) >= all_logits
    ours = functools.partial(token_stats, logits_bytes=4 * 4 * 64 * 128)
    assert largest_array(gradient(ours), hidden, head) == 64 * 128  # a tile
    assert largest_array(lambda *x: ours(*x, targets), hidden, head) == 64 * 128


def test_masked_rows_are_zero_and_get_no_gradient():
    inputs, mask = problem(), np.arange(N) % 3 != 0
    stats, (d_hidden, d_head) = evaluate(token_stats, inputs, mask=mask)
    assert not np.any(stats[:, ~mask])
    np.testing.assert_allclose(stats[:, mask], truth(*inputs)[:, mask], rtol=2e-6, atol=2e-6)
    assert not np.any(d_hidden[~mask]) and np.all(np.any(d_hidden[mask], axis=1))
    _, (_, naive_d_head) = evaluate(naive, inputs, mask=mask)
    np.testing.assert_allclose(d_head, naive_d_head, rtol=1e-5, atol=1e-5)


def test_logits_of_80_stay_exact():
    """One certain row, one certain of something else, one torn between two, one flat at -80."""
    logits = np.full((4, V), -80.0, np.float32)
    logits[[0, 1, 2, 2], [3, 3, 3, 4]] = 80.0
    targets = np.array([3, 4, 3, 3], np.int32)
    inputs = (logits, np.eye(V, dtype=np.float32), targets)
    (stats, ours), (_, want) = (evaluate(f, inputs) for f in (token_stats, naive))
    np.testing.assert_allclose(stats, truth(*inputs), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats[0], [0, -160, -math.log(2), -math.log(V)], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), ours, want)


def test_bfloat16_inputs_lose_no_more_than_their_own_rounding():
    """Sums are float32: for rounded inputs statistics are exact, only gradients are not."""
    hidden, head, targets = problem()
    inputs = (jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16), targets)
    exact = tuple(np.asarray(x, np.float32) for x in inputs[:2]) + (targets,)
    stats, grads = evaluate(token_stats, inputs)
    assert stats.dtype == jnp.float32
    np.testing.assert_allclose(stats, truth(*exact), rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, evaluate(naive, exact)[1], strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(got.astype(np.float32) - want).max() < 2**-7 * np.abs(want).max()


def test_matmuls_of_bfloat16_are_asked_to_accumulate_in_float32():
    """Read from the program, since XLA may skip the rounding that another machine would do."""
    hidden, head, targets = problem()

    def total(hidden, head):
        return sum(map(jnp.sum, token_stats(hidden, head, targets)))

    inputs = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, head))
    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*inputs).jaxpr
    dots = [e for e in equations_of(jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 4  # logits, twice; both gradients
    for dot in dots:
        assert [x.aval.dtype for x in dot.invars] == [jnp.bfloat16] * 2
        assert dot.params["preferred_element_type"] == jnp.float32
