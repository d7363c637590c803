"""The head against a float64 truth, against autodiff, in chunks, and without ever holding [N, V]."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.ops import head as head_module
from srft_jax.ops.head import TokenStats, token_loss, token_stats

N, D, V = 13, 8, 37  # no two share a factor
PER_ROW = np.linspace(0.5, 2.0, N).astype(np.float32)
SETTINGS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "temperature per row": dict(temperature=PER_ROW),
    "softcap": dict(softcap=2.0),
    "softcap and temperature per row": dict(softcap=2.0, temperature=PER_ROW),
}


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 4 * V * 4)


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


def naive(hidden, head, targets, temperature=1.0, softcap=None):
    """The same in jax.numpy, for autodiff."""
    logits = hidden @ head
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logp = jax.nn.log_softmax(logits / jnp.reshape(jnp.asarray(temperature), (-1, 1)))
    logprob = jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0]
    return TokenStats(logprob, -(jnp.exp(logp) * logp).sum(axis=1))


def gradients(function, hidden, head, targets, **settings):
    """Of a random combination of both outputs, by hidden and head; compiled anew at every call."""
    weights = np.random.default_rng(9).normal(size=(2, len(targets))).astype(np.float32)

    def total(hidden, head):
        return jnp.sum(jnp.stack(function(hidden, head, targets, **settings)) * weights)

    return jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head), weights


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_stats_equal_the_float64_truth(settings, four_rows_a_chunk):
    inputs = problem()
    stats = jax.jit(lambda *inputs: token_stats(*inputs, **settings))(*inputs)
    assert [x.dtype for x in stats] == [jnp.float32] * 2
    np.testing.assert_allclose(np.stack(stats), truth(*inputs, **settings), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_equal_autodiff_of_the_naive_head(settings, four_rows_a_chunk):
    inputs = problem()
    ours, _ = gradients(token_stats, *inputs, **settings)
    expected, _ = gradients(naive, *inputs, **settings)
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_equal_finite_differences_of_the_truth(settings):
    hidden, head, targets = problem()
    grads, weights = gradients(token_stats, hidden, head, targets, **settings)
    random, step = np.random.default_rng(5), 1e-5
    moves = [random.normal(size=x.shape) for x in (hidden, head)]
    for moved, gradient in enumerate(grads):
        sides = []
        for sign in (1, -1):
            inputs = [hidden.astype(np.float64), head.astype(np.float64)]
            inputs[moved] += sign * step * moves[moved]
            sides.append(np.sum(weights * truth(*inputs, targets, **settings)))
        slope = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * moves[moved]), slope, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows_in_chunk", [1, 4, 12])
def test_chunks_change_nothing(rows_in_chunk, monkeypatch):
    inputs = problem()
    whole, whole_gradients = token_stats(*inputs), gradients(token_stats, *inputs)[0]
    assert len(split_lengths(*inputs)) == 1
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 4 * V * rows_in_chunk)
    assert split_lengths(*inputs) == {math.ceil(N / rows_in_chunk)}
    for got, want in zip(token_stats(*inputs), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    for got, want in zip(gradients(token_stats, *inputs)[0], whole_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def split_lengths(*inputs):
    """Iterations of the loops over chunks that the head is traced to."""
    equations = equations_of(jax.make_jaxpr(lambda *inputs: token_stats(*inputs))(*inputs).jaxpr)
    return {e.params["length"] for e in equations if e.primitive.name == "scan"}


def equations_of(jaxpr):
    """All equations, those of nested programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from equations_of(inner)


def largest_array(function, *inputs):
    """Elements of the largest array that the traced function makes anywhere."""
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    return max(v.aval.size for e in equations_of(jaxpr) for v in e.outvars)


def test_no_array_of_all_logits_is_made(four_rows_a_chunk):
    hidden, head, targets = problem(num_rows=64)

    def gradient(function):
        def total(hidden, head):
            return sum(map(jnp.sum, function(hidden, head, targets)))

        return jax.grad(total, argnums=(0, 1))

    all_logits = 64 * V
    assert largest_array(gradient(naive), hidden, head) >= all_logits
    assert largest_array(gradient(token_stats), hidden, head) < all_logits
    assert largest_array(lambda *x: token_stats(*x, targets), hidden, head) < all_logits


def test_masked_rows_are_zero_and_get_no_gradient(four_rows_a_chunk):
    hidden, head, targets = problem()
    mask = np.arange(N) % 3 != 0
    stats = token_stats(hidden, head, targets, mask=mask)
    assert not np.any(np.stack(stats)[:, ~mask])
    np.testing.assert_allclose(
        np.stack(stats)[:, mask], truth(hidden, head, targets)[:, mask], rtol=2e-6, atol=2e-6
    )

    (d_hidden, d_head), weights = gradients(token_stats, hidden, head, targets, mask=mask)
    assert not np.any(d_hidden[~mask]) and np.all(np.any(d_hidden[mask], axis=1))

    def of_the_others(head):
        stats = naive(hidden[mask], head, targets[mask])
        return jnp.sum(jnp.stack(stats) * weights[:, mask])

    np.testing.assert_allclose(d_head, jax.grad(of_the_others)(head), rtol=1e-5, atol=1e-5)


def test_logits_of_80_stay_exact():
    """One certain row, one certain of something else, one torn between two, one flat at -80."""
    logits = np.full((4, V), -80.0, np.float32)
    logits[[0, 1, 2, 2], [3, 3, 3, 4]] = 80.0
    targets = np.array([3, 4, 3, 3], np.int32)
    inputs = (logits, np.eye(V, dtype=np.float32), targets)
    stats = np.stack(token_stats(*inputs))
    np.testing.assert_allclose(stats, truth(*inputs), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats[0], [0, -160, -math.log(2), -math.log(V)], rtol=1e-6)
    ours, expected = gradients(token_stats, *inputs)[0], gradients(naive, *inputs)[0]
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_bfloat16_inputs_lose_no_more_than_their_own_rounding():
    """Accumulated in float32: against the truth of the rounded inputs only gradients are rounded."""
    hidden, head, targets = problem()
    rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    stats = token_stats(*rounded, targets)
    expected = truth(*(np.asarray(x, np.float32) for x in rounded), targets)
    assert [x.dtype for x in stats] == [jnp.float32] * 2
    np.testing.assert_allclose(np.stack(stats), expected, rtol=1e-5, atol=1e-5)

    ours, _ = gradients(token_stats, *rounded, targets)
    exact, _ = gradients(naive, *(x.astype(jnp.float32) for x in rounded), targets)
    for got, want in zip(ours, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(got.astype(np.float32) - want).max() < 2**-7 * np.abs(want).max()


def test_token_loss_is_the_sum_of_the_objective():
    hidden, head, targets = problem()
    rows = SimpleNamespace(targets=targets, loss_mask=np.arange(N) > 4, weight=PER_ROW)

    def objective(stats, rows):
        return jnp.where(rows.loss_mask, rows.weight * jnp.square(stats.logprob) + stats.entropy, 0)

    def ours(hidden, head):
        return token_loss(hidden, head, rows, objective, temperature=0.6)

    def expected(hidden, head):
        return jnp.sum(objective(naive(hidden, head, targets, 0.6), rows))

    (loss, stats), got = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head)
    want_loss, want = jax.value_and_grad(expected, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    np.testing.assert_array_equal(
        np.stack(stats),
        np.stack(token_stats(hidden, head, targets, mask=rows.loss_mask, temperature=0.6)),
    )


def test_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="'pallas' is not one of"):
        token_stats(*problem(), implementation="pallas")
