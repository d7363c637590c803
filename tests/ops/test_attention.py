"""Attention over packed rows against a loop over heads and queries, and against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import HEADS, KV_HEADS, OPTIONS, B, H, by_mask, problem, with_gradients

from srft_jax.ops.attention import ScoreOptions, packed_attention
from srft_jax.ops.attention_chunks import cut_chunks
from srft_jax.ops.attention_scores import masked_scores
from srft_jax.ops.attention_terms import Extent, TileSizes, grouped, make_sight


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def one_by_one(query, key, value, segment_ids):
    """Attention in float64, one query of one head at a time."""
    out = np.zeros(query.shape)
    for b, t, n in np.ndindex(query.shape[:3]):
        kv_head = n // (HEADS // KV_HEADS)
        seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        scores = [np.dot(query[b, t, n].astype(float), key[b, kv_head, s]) / H**0.5 for s in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        out[b, t, n] = weights @ value[b, kv_head, seen]
    return out


def plain(query, key, value, segment_ids, tiles=TileSizes()):
    return packed_attention(query, key, value, segment_ids, OPTIONS, tiles=tiles)


def test_packed_attention_equals_a_loop_over_heads():
    inputs = problem(21)
    got, want = jax.jit(plain)(*inputs), one_by_one(*inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [7, 8, 21, 40])
def test_packed_attention_and_its_gradients_equal_those_of_all_scores(length):
    """One chunk of queries, several, and a last one that is shorter."""
    tiles = TileSizes(most_chunks=3, least_queries=8)
    inputs = problem(length)
    chunks = cut_chunks(make_sight(inputs[3], None, None, None), Extent(), tiles)
    assert [queries.stop for queries, *_ in chunks][-1] == length
    assert len(chunks) == {7: 1, 8: 1, 21: 3, 40: 3}[length]
    ours = functools.partial(plain, tiles=tiles)
    got, want = (with_gradients(function, *inputs) for function in (ours, by_mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("window", "options"),
    [(None, ScoreOptions(0.9, 0.7)), (3, ScoreOptions(0.9, 0.7)), (1, ScoreOptions(0.9))],
)
def test_windows_caps_and_their_gradients_equal_those_of_all_scores(options, window):
    """A window that the device turns on, as in a scan over layers, gives the same."""
    inputs = problem(21)
    static = functools.partial(
        packed_attention, options=options, window=window, tiles=TileSizes(least_queries=8)
    )
    naive = functools.partial(by_mask, options=options, window=window)
    got, want = (with_gradients(f, *inputs) for f in (static, naive))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    (_, other), _ = with_gradients(plain, *inputs)
    assert np.abs(got[0][1] - other).max() > 0.01
    on = jnp.bool_(window is not None)
    traced = with_gradients(functools.partial(static, window=window or 2, slides=on), *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, traced)


def test_keys_of_other_segments_have_no_influence():
    query, key, value, _ = problem(9)
    segment_ids = np.array([[1] * 4 + [2] * 3 + [0] * 2] * B)
    attend = jax.jit(plain)
    before = attend(query, key, value, segment_ids)
    other = np.arange(9)[:, None] < 4
    after = attend(query, np.where(other, 100.0, key), np.where(other, -100.0, value), segment_ids)
    np.testing.assert_array_equal(before[:, 4:], after[:, 4:])
    assert np.abs(before[:, :4] - after[:, :4]).max() > 1


def test_packed_attention_of_bfloat16():
    *arrays, segment_ids = problem(21)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    wide = [x.astype(jnp.float32) for x in rounded]
    (_, out), grads = with_gradients(plain, *rounded, segment_ids)
    (_, want), wanted = with_gradients(by_mask, *wide, segment_ids)
    for got, exact in zip((out, *grads), (want, *wanted), strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.abs(got.astype(np.float32) - exact).max() < 2**-5 * np.abs(exact).max()


def test_products_of_bfloat16_are_summed_in_float32():
    """Read from the program, since XLA may skip a rounding."""
    *arrays, segment_ids = problem(9)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    program = str(jax.make_jaxpr(plain)(*rounded, segment_ids))
    assert program.count("dot_general[") == program.count("preferred_element_type=float32") == 2


def test_scores_of_bfloat16_are_scaled_in_float32():
    """1 / sqrt(H) is no power of two for H = 6: a query scaled in bfloat16 is rounded once more."""
    query, key, _, _ = problem(9)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (8 * query, key)]
    by_head = grouped(rounded[0], KV_HEADS)
    scores = masked_scores(by_head, rounded[1], jnp.ones((B, 9, 9), bool), OPTIONS)
    wide = [np.asarray(x, np.float32) for x in (by_head, rounded[1])]
    exact = np.einsum("bkqh,bksh->bkqs", *wide) / H**0.5
    np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-5)


def test_the_last_query_alone_reads_all_keys():
    """Chunks stop at their last query: fewer scores than T x T are ever made."""
    inputs = problem(512)
    jaxpr = str(jax.make_jaxpr(plain)(*inputs))
    assert f"f32[{B},{KV_HEADS},{2 * 64},512]" in jaxpr
    assert f"{2 * 512},512]" not in jaxpr
    # With a window of 100 not even the last one: its keys start at 448 - 99, rounded down to 320.
    windowed = functools.partial(packed_attention, options=OPTIONS, window=100)
    jaxpr = str(jax.make_jaxpr(windowed)(*inputs))
    assert f"f32[{B},{KV_HEADS},{2 * 64},{512 - 320}]" in jaxpr
    assert f"{2 * 64},512]" not in jaxpr
