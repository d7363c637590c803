"""Grouped-query attention over packed rows: of training, and of prompts before decoding."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.layers import softcapped

# Far below any real score, finite: a row that may see nothing (padding) gives a mean of values,
# never a NaN.
_MASKED = -1e30

# Queries go in chunks, and a chunk reads no key behind its last query: of T^2 scores, T^2 / 2
# (1 + 1 / chunks) are computed. More chunks save little more, and each is compiled apart.
_MOST_CHUNKS, _LEAST_QUERIES = 8, 64


class ScoreOptions(NamedTuple):
    """score = softcapped(scale q k^T, softcap)."""

    scale: float
    softcap: float | None = None


class Part(NamedTuple):
    """Which queries of split rows are here; the keys are those of whole rows, in order.

    Attributes:
        slots: Of each part, where in the row its queries stand, [parts, T]; known before tracing.
        number: Of the part that is here.
        key_segment_ids: Of whole rows.
    """

    slots: np.ndarray
    number: Int[Array, ""]
    key_segment_ids: Int[Array, "B S"]


Kernel = Literal["xla", "splash", "cudnn"]


def packed_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B T"],
    options: ScoreOptions,
    window: int | None = None,
    *,
    slides: Bool[Array, ""] | None = None,
    part: Part | None = None,
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """softmax(score) v, where query t sees key s if s <= t and both are of one segment.

    Scores and softmax are float32; query head n reads kv head n // (N / K). No score is kept for
    the backward pass, which computes them again from the output and each query's log-sum-exp.
    In: segment_ids [1, 1, 2].  Out: queries see keys [1, 0, 0], [1, 1, 0], [0, 0, 1].

    Args:
        query: Of the tokens here.
        key: Of whole rows.
        value: Of whole rows.
        segment_ids: Of the queries.
        options: Scale and cap of the scores.
        window: With it a query sees t - s < window only, of tokens that stand side by side.
        slides: Whether the window holds, where that is known on the device only; by default it
            does.
        part: Of split rows, which part the queries are; by default S = T and rows are whole.
        kernel: How it is computed.
    """
    grouped = _grouped(query, key.shape[1])
    seen = _Seen(segment_ids, segment_ids, jnp.arange(segment_ids.shape[1]), None)
    if part is not None:
        slots = jnp.asarray(part.slots, jnp.int32)[part.number]
        seen = _Seen(segment_ids, part.key_segment_ids, slots, None)
    if window is not None:
        reach = window if slides is None else jnp.where(slides, window, key.shape[2])
        seen = seen._replace(window=reach)
    mixed = _packed(options, part is None, grouped, key, value, seen)
    return _ungrouped(mixed, query.shape[1])


class _Seen(NamedTuple):
    """What decides which key a query sees."""

    segment_ids: Int[Array, "B T"]
    key_segment_ids: Int[Array, "B S"]
    slots: Int[Array, " T"]
    window: int | Int[Array, ""] | None


def _grouped(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K GT H"]:
    """The queries that share a kv head are one matmul."""
    batch, length, num_heads, head_dim = query.shape
    query = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return query.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)


def _ungrouped(grouped: Float[Array, "B K GT H"], length: int) -> Float[Array, "B T N H"]:
    batch, num_kv_heads, _, head_dim = grouped.shape
    grouped = grouped.reshape(batch, num_kv_heads, -1, length, head_dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)


def _matmul(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scores(
    query: Array, key: Array, mask: Bool[Array, "B T S"], options: ScoreOptions
) -> Float[Array, "B K GT S"]:
    """Scaled in float32: a query scaled before would be rounded once more."""
    scores = _matmul("bkqh,bksh->bkqs", query, key) * options.scale
    scores = softcapped(scores, options.softcap)
    batch, num_kv_heads, _, num_keys = scores.shape
    by_query = scores.reshape(batch, num_kv_heads, -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_query, _MASKED).reshape(scores.shape)


def _chunk_forward(
    query: Array, key: Array, value: Array, mask: Array, options: ScoreOptions
) -> tuple[Float[Array, "B K GT H"], Float[Array, "B K GT"]]:
    """Output, and the log-sum-exp of each query's scores."""
    scores = _scores(query, key, mask, options)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _matmul("bkqs,bksh->bkqh", weights.astype(value.dtype), value) / total
    return out.astype(value.dtype), (highest + jnp.log(total))[..., 0]


def _chunk_backward(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    out: Array,
    lse: Array,
    d_out: Array,
    options: ScoreOptions,
) -> tuple[Array, Array, Array]:
    """Gradients by query, key and value, float32.

    With P the weights, dP = dO v^T, a the scale, S the scores and c their cap:
    dS = a P (dP - sum(dO O)) (1 - (S / c)^2),  dq = dS k,  dk = dS^T q,  dv = P^T dO.
    """
    scores = _scores(query, key, mask, options)
    weights = jnp.exp(scores - lse[..., None])
    d_value = _matmul("bkqs,bkqh->bksh", weights.astype(value.dtype), d_out)
    d_weights = _matmul("bkqh,bksh->bkqs", d_out, value)
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = weights * (d_weights - mean) * options.scale
    if options.softcap is not None:
        # What is masked lies far outside of the cap; its weight is 0, and 0 * inf would be NaN.
        d_scores *= 1 - jnp.square(jnp.maximum(scores, -options.softcap) / options.softcap)
    d_scores = d_scores.astype(query.dtype)
    d_query = _matmul("bkqs,bksh->bkqh", d_scores, key)
    return d_query, _matmul("bkqs,bkqh->bksh", d_scores, query), d_value


def _chunks(seen: _Seen, whole: bool) -> list[tuple[slice, Bool[Array, "B C S"]]]:
    """Queries [start, end) and which of the keys each of them sees: of whole rows, of [0, end)."""
    length, num_keys = seen.segment_ids.shape[1], seen.key_segment_ids.shape[1]
    size = max(_LEAST_QUERIES, -(-length // _MOST_CHUNKS))
    chunks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        queries, keys = seen.slots[start:end, None], jnp.arange(end if whole else num_keys)
        causal = keys <= queries
        if seen.window is not None:
            causal &= queries - keys < seen.window
        of_keys = seen.key_segment_ids[:, None, : keys.size]
        same = seen.segment_ids[:, start:end, None] == of_keys
        chunks.append((slice(start, end), causal & same))
    return chunks


def _of_queries(grouped: Array, length: int, queries: slice) -> Array:
    """Rows [B, K, G * T, ...] of some positions, for all G heads."""
    shape = (*grouped.shape[:2], -1, length, *grouped.shape[3:])
    part = grouped.reshape(shape)[:, :, :, queries]
    return part.reshape(*grouped.shape[:2], -1, *grouped.shape[3:])


def _over_queries(parts: list[Array], chunks: list[tuple[slice, Array]]) -> Array:
    """Undoes `_of_queries`."""
    by_head = [
        part.reshape(*part.shape[:2], -1, mask.shape[1], *part.shape[3:])
        for part, (_, mask) in zip(parts, chunks, strict=True)
    ]
    joined = jnp.concatenate(by_head, axis=3)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _packed(
    options: ScoreOptions,
    whole: bool,
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    seen: _Seen,
) -> Float[Array, "B K GT H"]:
    return _packed_forward(options, whole, query, key, value, seen)[0]


def _packed_forward(
    options: ScoreOptions, whole: bool, query: Array, key: Array, value: Array, seen: _Seen
) -> tuple[Array, tuple[Any, ...]]:
    length, chunks = seen.segment_ids.shape[1], _chunks(seen, whole)
    results = [
        _chunk_forward(
            _of_queries(query, length, queries),
            key[:, :, : mask.shape[2]],
            value[:, :, : mask.shape[2]],
            mask,
            options,
        )
        for queries, mask in chunks
    ]
    outs, lses = ([result[i] for result in results] for i in (0, 1))
    out = checkpoint_name(_over_queries(outs, chunks), "attention")
    lse = checkpoint_name(_over_queries(lses, chunks), "attention_lse")
    return out, (query, key, value, seen, out, lse)


def _packed_backward(
    options: ScoreOptions, whole: bool, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array | None, ...]:
    query, key, value, seen, out, lse = saved
    length, chunks = seen.segment_ids.shape[1], _chunks(seen, whole)
    of = functools.partial(_of_queries, length=length)
    d_queries = []
    d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    for queries, mask in chunks:
        keys = slice(mask.shape[2])
        d_query, more_key, more_value = _chunk_backward(
            of(query, queries=queries),
            key[:, :, keys],
            value[:, :, keys],
            mask,
            of(out, queries=queries),
            of(lse, queries=queries),
            of(d_out, queries=queries),
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


_packed.defvjp(_packed_forward, _packed_backward)
