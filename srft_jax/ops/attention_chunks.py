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
from srft_jax.ops.attention_terms import Extent, ScoreOptions, Sight

# A chunk reads no key behind its last query: of T^2 scores, T^2 / 2 (1 + 1 / chunks) are computed.
# More chunks save little more, and each is compiled apart.
_MOST_CHUNKS, _LEAST_QUERIES = 8, 64

# Of queries, of the keys that they may see, and which of those each of them sees.
_Chunk = tuple[slice, slice, Bool[Array, "B C S"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_attention(
    options: ScoreOptions,
    extent: Extent,
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
) -> Float[Array, "B K GT H"]:
    """softmax(score) v."""
    return _forward(options, extent, query, key, value, sight)[0]


def _forward(
    options: ScoreOptions, extent: Extent, query: Array, key: Array, value: Array, sight: Sight
) -> tuple[Array, tuple[Any, ...]]:
    length, chunks = sight.segment_ids.shape[1], _chunks(sight, extent)
    results = [
        _mixed(
            _of_queries(query, length, queries), key[:, :, keys], value[:, :, keys], mask, options
        )
        for queries, keys, mask in chunks
    ]
    outs, lses = ([result[i] for result in results] for i in (0, 1))
    out = checkpoint_name(_over_queries(outs, chunks), "attention")
    lse = checkpoint_name(_over_queries(lses, chunks), "attention_lse")
    return out, (query, key, value, sight, out, lse)


def _backward(
    options: ScoreOptions, extent: Extent, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array | None, ...]:
    query, key, value, sight, out, lse = saved
    length, chunks = sight.segment_ids.shape[1], _chunks(sight, extent)
    mean = mean_gradient(out, d_out)
    d_queries = []
    d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    for queries, keys, mask in chunks:
        of = functools.partial(_of_queries, length=length, queries=queries)
        d_query, more_key, more_value = score_gradients(
            of(query),
            key[:, :, keys],
            value[:, :, keys],
            mask,
            of(mean),
            of(lse),
            of(d_out),
            options,
        )
        d_queries.append(d_query)
        d_key = d_key.at[:, :, keys].add(more_key)
        d_value = d_value.at[:, :, keys].add(more_value)
    d_query = _over_queries(d_queries, chunks)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


chunked_attention.defvjp(_forward, _backward)


def _chunks(sight: Sight, extent: Extent) -> list[_Chunk]:
    length, num_keys = sight.segment_ids.shape[1], sight.key_segment_ids.shape[1]
    size = max(_LEAST_QUERIES, -(-length // _MOST_CHUNKS))
    ranges = extent.chunks(length, num_keys, size)
    return [(queries, keys, sight.mask_of(queries, keys)) for queries, keys in ranges]


def _mixed(
    query: Array, key: Array, value: Array, mask: Array, options: ScoreOptions
) -> tuple[Float[Array, "B K GT H"], Float[Array, "B K GT"]]:
    """Output, and the log-sum-exp of each query's scores."""
    scores = masked_scores(query, key, mask, options)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = matmul("bkqs,bksh->bkqh", weights.astype(value.dtype), value) / total
    return out.astype(value.dtype), (highest + jnp.log(total))[..., 0]


def _of_queries(grouped: Array, length: int, queries: slice) -> Array:
    """Rows [B, K, G * T, ...] of some positions, for all G heads."""
    shape = (*grouped.shape[:2], -1, length, *grouped.shape[3:])
    part = grouped.reshape(shape)[:, :, :, queries]
    return part.reshape(*grouped.shape[:2], -1, *grouped.shape[3:])


def _over_queries(parts: list[Array], chunks: list[_Chunk]) -> Array:
    """Undoes `_of_queries`."""
    by_head = [
        part.reshape(*part.shape[:2], -1, mask.shape[1], *part.shape[3:])
        for part, (_, _, mask) in zip(parts, chunks, strict=True)
    ]
    joined = jnp.concatenate(by_head, axis=3)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])
