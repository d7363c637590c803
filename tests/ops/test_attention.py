"""Attention against a loop over heads and queries, and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.ops.attention import attention, packed_mask

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

    equations = jax.make_jaxpr(attention)(*rounded, mask).jaxpr.eqns
    made = {name: [e.outvars[0].aval.dtype for e in equations if e.primitive.name == name]
            for name in ("dot_general", "exp")}  # fmt: skip
    assert made == {"dot_general": [jnp.float32, jnp.bfloat16], "exp": [jnp.float32]}


def test_packed_mask_is_causal_within_segments():
    segment_ids = np.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]], np.int32)
    mask = np.asarray(packed_mask(segment_ids))
    for b, t, s in np.ndindex(mask.shape):
        assert mask[b, t, s] == (s <= t and segment_ids[b, t] == segment_ids[b, s])
