"""Attention over short rows by XLA: a few chunks of queries, each with all keys that it may see.

Every chunk is compiled apart, so that each multiplies with no more keys than it has to.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from srft_jax.ops.attention_scores import masked_scores, matmul, mean_gradient, score_gradients
from srft_jax.ops.attention_terms import Extent, ScoreOptions, Sight, TileSizes

# A range of queries, a range of keys with all that they may see, and which keys each query sees.
Chunk = tuple[slice, slice, Bool[Array, "B C S"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunked_attention(
    options: ScoreOptions,
    extent: Extent,
    tiles: TileSizes,
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
) -> Float[Array, "B K GT H"]:
    """Return softmax(score) v."""
    return _forward(options, extent, tiles, query, key, value, sight)[0]


def _forward(
    options: ScoreOptions,
    extent: Extent,
    tiles: TileSizes,
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
) -> tuple[Array, tuple[Any, ...]]:
    length, chunks = sight.segment_ids.shape[1], cut_chunks(sight, extent, tiles)
    outs, lses = [], []
    for queries, keys, mask in chunks:
        chunk = _select_queries(query, length, queries)
        out, lse = _attend(chunk, key[:, :, keys], value[:, :, keys], mask, options)
        outs.append(out)
        lses.append(lse)
    # `model.remat: dots` keeps the two arrays by their names, see attention_loop.py.
    out = checkpoint_name(_joined(outs, chunks), "attention")
    lse = checkpoint_name(_joined(lses, chunks), "attention_lse")
    return out, (query, key, value, sight, out, lse)


def _backward(
    options: ScoreOptions,
    extent: Extent,
    tiles: TileSizes,
    saved: tuple[Any, ...],
    d_out: Array,
) -> tuple[Array | None, ...]:
    query, key, value, sight, out, lse = saved
    length, chunks = sight.segment_ids.shape[1], cut_chunks(sight, extent, tiles)
    mean = mean_gradient(out, d_out)
    d_queries = []
    d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    for queries, keys, mask in chunks:
        select = functools.partial(_select_queries, length=length, queries=queries)
        d_query, more_key, more_value = score_gradients(
            query=select(query),
            key=key[:, :, keys],
            value=value[:, :, keys],
            mask=mask,
            mean=select(mean),
            lse=select(lse),
            d_out=select(d_out),
            options=options,
        )
        # Each query is in one chunk, but chunks share keys.
        d_queries.append(d_query)
        d_key = d_key.at[:, :, keys].add(more_key)
        d_value = d_value.at[:, :, keys].add(more_value)
    d_query = _joined(d_queries, chunks)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


chunked_attention.defvjp(_forward, _backward)


def cut_chunks(sight: Sight, extent: Extent, tiles: TileSizes) -> list[Chunk]:
    """Return the chunks of queries, in order.

    In: 200 queries, at most 8 chunks of at least 64.  Out: queries [0, 64), ..., [192, 200).
    """
    length, num_keys = sight.segment_ids.shape[1], sight.key_segment_ids.shape[1]
    size = max(tiles.least_queries, -(-length // tiles.most_chunks))
    ranges = extent.chunks(length, num_keys, size)
    return [(queries, keys, sight.mask_between(queries, keys)) for queries, keys in ranges]


def _attend(
    query: Array, key: Array, value: Array, mask: Array, options: ScoreOptions
) -> tuple[Float[Array, "B K GT H"], Float[Array, "B K GT"]]:
    """Return the output of a chunk, and the log-sum-exp of each query's scores."""
    scores = masked_scores(query, key, mask, options)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided after the product: in bfloat16, weights are rounded relative to the highest score, as
    # the sampler rounds them (decode_attention.py).
    out = matmul("bkqs,bksh->bkqh", weights.astype(value.dtype), value) / total
    return out.astype(value.dtype), (highest + jnp.log(total))[..., 0]


def _select_queries(grouped: Array, length: int, queries: slice) -> Array:
    """Select positions, of all G heads: [B, K, G T, ...] -> [B, K, G C, ...]."""
    shape = (*grouped.shape[:2], -1, length, *grouped.shape[3:])
    part = grouped.reshape(shape)[:, :, :, queries]
    return part.reshape(*grouped.shape[:2], -1, *grouped.shape[3:])


def _joined(parts: list[Array], chunks: list[Chunk]) -> Array:
    """Join arrays of all chunks, each from `_select_queries`: [B, K, G T, ...]."""
    by_head = [
        part.reshape(*part.shape[:2], -1, mask.shape[1], *part.shape[3:])
        for part, (_, _, mask) in zip(parts, chunks, strict=True)
    ]
    joined = jnp.concatenate(by_head, axis=3)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])
