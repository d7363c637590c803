"""Attention against a loop over heads and queries; over packed rows, against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.ops import attention as attention_module
from srft_jax.ops.attention import attention, packed_attention

attend = jax.jit(attention)
B, T, S, HEADS, KV_HEADS, H = 2, 3, 5, 4, 2, 6


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def problem():  # numpy, so that tests may write to it
    random = np.random.default_rng(0)
    shapes = (B, T, HEADS, H), (B, KV_HEADS, S, H), (B, KV_HEADS, S, H)
    query, key, value = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    mask = random.random((B, T, S)) < 0.6
    mask[..., 0] = True
    return query, key, value, mask


def naive(query, key, value, mask):
    """float64, one query of one head at a time."""
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(B, T, HEADS):
        kv_head = n // (HEADS // KV_HEADS)
        seen = np.flatnonzero(mask[b, t])
        scores = [np.dot(query[b, t, n].astype(float), key[b, kv_head, s]) / H**0.5 for s in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        out[b, t, n] = weights @ value[b, kv_head, seen]
    return out


def test_attention_equals_a_loop_over_heads():
    inputs = problem()
    np.testing.assert_allclose(attend(*inputs), naive(*inputs), rtol=1e-5, atol=1e-6)


def test_hidden_keys_have_no_influence():
    query, key, value, mask = problem()
    mask[:, :, 3] = False
    before = attend(query, key, value, mask)
    key[:, :, 3], value[:, :, 3] = 100.0, -100.0
    np.testing.assert_array_equal(before, attend(query, key, value, mask))


def test_a_query_that_sees_nothing_gives_no_nan():
    query, key, value, mask = problem()
    mask[0, 1] = False

    def total(*inputs):
        out = attention(*inputs, mask)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(query, key, value)
    np.testing.assert_allclose(out[0, 1, 0], value[0, 0].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert all(np.all(np.isfinite(x)) for x in (out, *grads))


def test_bfloat16_inputs():
    """Scores and softmax are float32: read from the program, since XLA may skip a rounding."""
    query, key, value, mask = problem()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    out = attend(*rounded, mask)
    assert out.dtype == jnp.bfloat16
    expected = naive(*(np.asarray(x, np.float32) for x in rounded), mask)
    assert np.abs(np.asarray(out, np.float32) - expected).max() < 2**-6 * np.abs(expected).max()

    for dot in dots_of(attention, *rounded, mask):
        assert dot.params["preferred_element_type"] == jnp.float32


def test_scores_of_bfloat16_are_scaled_in_float32():
    """1 / sqrt(H) is no power of two for H = 6: a query scaled in bfloat16 is rounded once more."""
    query, key, value, mask = problem()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (8 * query, key)]
    scores = attention_module._scores(
        attention_module._grouped(rounded[0], KV_HEADS), rounded[1], jnp.ones_like(mask)
    )
    wide = [np.asarray(x, np.float32) for x in rounded]
    grouped = attention_module._grouped(jnp.asarray(wide[0]), KV_HEADS)
    exact = np.einsum("bkqh,bksh->bkqs", grouped, wide[1]) / H**0.5
    np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-5)


def dots_of(function, *inputs):
    equations = jax.make_jaxpr(function)(*inputs).jaxpr.eqns
    dots = [e for e in equations if e.primitive.name == "dot_general"]
    assert len(dots) == 2
    return dots


def packed_problem(length, dtype=np.float32):
    """Queries, keys, values and segments of a few tokens each, padding at the end."""
    random = np.random.default_rng(length)
    shapes = (B, length, HEADS, H), (B, KV_HEADS, length, H), (B, KV_HEADS, length, H)
    arrays = [random.normal(size=shape).astype(dtype) for shape in shapes]
    starts = random.random((B, length)) < 0.2
    return *arrays, np.where(np.arange(length) < length - 3, 1 + starts.cumsum(axis=1), 0)


def by_mask(query, key, value, segment_ids):
    """The same with every score, for autodiff."""
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return attention(query, key, value, same & np.tri(length, dtype=bool))


def with_gradients(function, *inputs):
    *arrays, segment_ids = inputs

    def total(*arrays):
        out = function(*arrays, segment_ids)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize("length", [7, 8, 21, 40])
def test_packed_attention_equals_attention_under_its_mask(length, monkeypatch):
    """One chunk of queries, several, and a last one that is shorter."""
    monkeypatch.setattr(attention_module, "_LEAST_QUERIES", 8)
    monkeypatch.setattr(attention_module, "_MOST_CHUNKS", 3)
    inputs = packed_problem(length)
    chunks = attention_module._chunks(inputs[3])
    assert [queries.stop for queries, _ in chunks][-1] == length
    assert len(chunks) == {7: 1, 8: 1, 21: 3, 40: 3}[length]
    got, want = (with_gradients(f, *inputs) for f in (packed_attention, by_mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_packed_attention_of_bfloat16():
    *arrays, segment_ids = packed_problem(21)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    wide = [x.astype(jnp.float32) for x in rounded]
    (_, out), grads = with_gradients(packed_attention, *rounded, segment_ids)
    (_, want), wanted = with_gradients(by_mask, *wide, segment_ids)
    for got, exact in zip((out, *grads), (want, *wanted), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(got.astype(np.float32) - exact).max() < 2**-5 * np.abs(exact).max()


def test_the_last_query_alone_reads_all_keys():
    """Chunks stop at their last query: fewer scores than T x T are ever made."""
    inputs = packed_problem(512)
    jaxpr = str(jax.make_jaxpr(packed_attention)(*inputs))
    assert f"f32[{B},{KV_HEADS},{2 * 64},512]" in jaxpr
    assert f"{2 * 512},512]" not in jaxpr
