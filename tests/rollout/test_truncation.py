"""Which tokens a truncation leaves, against sorting the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.config import Truncation, UsageError
from srft_jax.rollout.truncation import threshold
from srft_jax.rollout.vocab_tiles import in_tiles

cut = jax.jit(threshold, static_argnums=1)
SPREADS = [1e-3, 0.3, 3.0, 10.0, 100.0]


def allowed(p, truncation):
    """[B, V]: what may be drawn. p: relative to the likeliest."""
    tiles = in_tiles(jnp.asarray(p), 0.0)
    least = cut(tiles, truncation)
    return np.asarray(tiles >= least[:, None, None]).reshape(len(p), -1)[:, : p.shape[1]]


def allowed_by_sorting(p, top_k, top_p, min_p):
    p = p.astype(np.float64)
    if top_k:
        kth = -np.sort(-p, axis=1)[:, min(top_k, p.shape[1]) - 1, None]
        p = np.where(p >= kth, p, 0.0)
    if top_p < 1:
        ordered = -np.sort(-p, axis=1)
        before = np.cumsum(ordered, axis=1) - ordered
        inside = (before < top_p * p.sum(axis=1, keepdims=True)) & (ordered > 0)
        least = np.where(inside, ordered, np.inf).min(axis=1, keepdims=True)
        p = np.where(p >= least, p, 0.0)
    return (p > 0) & (p >= min_p * p.max(axis=1, keepdims=True))


def relative(logits):
    """As `draw` computes it."""
    return np.asarray(jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True)))


@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(top_k=1),
        Truncation(top_k=50),
        Truncation(top_k=5_000),
        Truncation(top_p=1e-6),
        Truncation(top_p=0.95),
        Truncation(top_p=0.999),
        Truncation(min_p=0.05),
        Truncation(top_k=100, top_p=0.8, min_p=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("levels", [None, 8], ids=["distinct", "tied"])
def test_the_tokens_left_are_those_found_by_sorting(truncation, levels):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(100, 1_001)) * np.repeat(SPREADS, 20)[:, None]
    if levels:
        unit = np.repeat(SPREADS, 20)[:, None] / levels
        logits = np.round(logits / unit) * unit
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    p = relative(jnp.asarray(logits, jnp.float32))
    expected = allowed_by_sorting(p, truncation.top_k, truncation.top_p, truncation.min_p)
    assert not expected.all(), "the truncation drops something"
    np.testing.assert_array_equal(allowed(p, truncation), expected)


def test_top_k_keeps_so_many_where_no_two_are_tied():
    logits = np.random.default_rng(1).permuted(np.tile(np.arange(3_000) / 500, (8, 1)), axis=1)
    for top_k in (1, 64, 2_999):
        kept = allowed(relative(jnp.asarray(logits, jnp.float32)), Truncation(top_k=top_k))
        assert kept.sum(axis=1).tolist() == [top_k] * 8


def test_the_search_ends_on_rows_that_cannot_be_narrowed():
    """All equal, one token, and fewer tokens with probability than top-k asks for."""
    rows = np.zeros((3, 500), np.float32)
    rows[0], rows[1, 7], rows[2, :5] = 1.0, 1.0, [1.0, 0.5, 1e-30, 1e-44, 0.0]
    for truncation in (Truncation(top_k=9), Truncation(top_p=0.9), Truncation(9, 0.9)):
        kept = allowed(rows, truncation).sum(axis=1).tolist()
        assert kept == [500, 1, 3 if truncation.top_p == 1 else 2]


def test_a_large_vocabulary_is_cut_within_the_rounding_of_a_float32_sum():
    logits = jax.random.normal(jax.random.key(0), (2, 151_936)) * 0.3
    p = relative(logits)
    kept = allowed(p, Truncation(top_p=0.95))
    held = np.where(kept, p.astype(np.float64), 0).sum(axis=1) / p.astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(held, 0.95, atol=1e-5)
    for row_p, row_kept in zip(p, kept, strict=True):
        assert row_p[row_kept].min() > row_p[~row_kept].max()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("min_p", 2)],
)
def test_nonsense_is_refused_with_the_number(setting, value):
    with pytest.raises(UsageError, match=f"{setting} .*{value}"):
        Truncation(**{setting: value})
