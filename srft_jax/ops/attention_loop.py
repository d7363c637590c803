"""Attention over long rows by XLA: blocks of queries meet blocks of keys in a loop.

Memory is linear in T: of the scores there is one block at a time, in the backward pass as well,
which computes them again from the output and each query's log-sum-exp. Which blocks meet is read
from the data: those of other sequences, behind the queries or beyond the window cost nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.attention_scores import masked_scores, matmul, mean_gradient, score_gradients
from srft_jax.ops.attention_terms import ScoreOptions, Sight

_QUERIES, KEYS_PER_BLOCK = 256, 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def looped_attention(
    options: ScoreOptions,
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
) -> Float[Array, "B K GT H"]:
    """softmax(score) v. Weights are rounded relative to the highest score so far."""
    return _forward(options, query, key, value, sight)[0]


def _forward(
    options: ScoreOptions, query: Array, key: Array, value: Array, sight: Sight
) -> tuple[Array, tuple[Any, ...]]:
    length = sight.slots.shape[0]
    keys = _key_blocks(key, value, sight)

    def attend(block: tuple[Array, _Block]) -> tuple[Array, Array]:
        return _mixed(*block, keys, options)

    outs, lses = jax.lax.map(attend, (_query_blocks(query, length), _blocks(sight)))
    out = checkpoint_name(_joined(outs, length), "attention")
    lse = checkpoint_name(_joined(lses, length), "attention_lse")
    return out, (query, key, value, sight, out, lse)


def _backward(
    options: ScoreOptions, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array | None, ...]:
    query, key, value, sight, out, lse = saved
    length, num_keys = sight.slots.shape[0], key.shape[2]
    keys = _key_blocks(key, value, sight)
    arrays = (query, mean_gradient(out, d_out), lse, d_out)
    of_queries = tuple(_query_blocks(x, length) for x in arrays)

    def over_queries(sums: _Sums, block: tuple[tuple[Array, ...], _Block]) -> tuple[_Sums, Array]:
        return _with_gradients(sums, *block, keys, options)

    zeros = _Sums(*(jnp.zeros(x.shape, jnp.float32) for x in (keys.key, keys.value)))
    sums, d_queries = jax.lax.scan(over_queries, zeros, (of_queries, _blocks(sight)))
    d_key, d_value = (x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :num_keys] for x in sums)
    d_query = _joined(d_queries, length)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


looped_attention.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """A block of queries; of all blocks, with their number in front.

    Attributes:
        segment_ids: Of the queries.
        slots: Where in the row they stand.
        order: Numbers of all key blocks, those that one of the queries may see first.
        num_met: How many those are.
        window: The same for all.
    """

    segment_ids: Int[Array, "*n B C"]
    slots: Int[Array, "*n C"]
    order: Int[Array, "*n blocks"]
    num_met: Int[Array, "*n"]
    window: Int[Array, "*n"]


class _Keys(NamedTuple):
    """Keys, values and segments of all blocks."""

    key: Float[Array, "B K blocks C H"]
    value: Float[Array, "B K blocks C H"]
    segment_ids: Int[Array, "B blocks C"]

    def at(self, number: Array, queries: _Block) -> tuple[Array, Array, Array]:
        """Keys and values of a block, and which of them each query sees."""
        of_block = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        sight = Sight(
            queries.segment_ids, of_block(self.segment_ids, axis=1), queries.slots, queries.window
        )
        mask = sight.mask(number * KEYS_PER_BLOCK + jnp.arange(KEYS_PER_BLOCK))
        return of_block(self.key, axis=2), of_block(self.value, axis=2), mask


def _mixed(
    query: Float[Array, "B K GC H"], queries: _Block, keys: _Keys, options: ScoreOptions
) -> tuple[Float[Array, "B K GC H"], Float[Array, "B K GC"]]:
    """Output, and the log-sum-exp of each query's scores."""

    def more(n: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, total, highest = so_far
        key, value, mask = keys.at(queries.order[n], queries)
        scores = masked_scores(query, key, mask, options)
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
        total = total * kept + jnp.sum(weights, axis=-1)
        added = matmul("bkqs,bksh->bkqh", weights.astype(value.dtype), value)
        return mixed * kept[..., None] + added, total, higher

    zeros = jnp.zeros(query.shape, jnp.float32)
    start = (zeros, zeros[..., 0], jnp.full(query.shape[:-1], -jnp.inf))
    mixed, total, highest = jax.lax.fori_loop(0, queries.num_met, more, start)
    return (mixed / total[..., None]).astype(query.dtype), highest + jnp.log(total)


class _Sums(NamedTuple):
    """Gradients by keys and values, of all blocks, so far."""

    key: Float[Array, "B K blocks C H"]
    value: Float[Array, "B K blocks C H"]


def _with_gradients(
    sums: _Sums,
    of_queries: tuple[Array, ...],
    queries: _Block,
    keys: _Keys,
    options: ScoreOptions,
) -> tuple[_Sums, Float[Array, "B K GC H"]]:
    """With what a block of queries adds; and the gradient by them."""
    query, mean, lse, d_out = of_queries

    def more(n: Array, so_far: tuple[Array, _Sums]) -> tuple[Array, _Sums]:
        d_query, sums = so_far
        number = queries.order[n]
        key, value, mask = keys.at(number, queries)
        added = score_gradients(query, key, value, mask, mean, lse, d_out, options)
        d_keys = (x.at[:, :, number].add(y) for x, y in zip(sums, added[1:], strict=True))
        return d_query + added[0], _Sums(*d_keys)

    d_query, sums = jax.lax.fori_loop(
        0, queries.num_met, more, (jnp.zeros(query.shape, jnp.float32), sums)
    )
    return sums, d_query


def _query_blocks(grouped: Float[Array, "B K GT *H"], length: int) -> Float[Array, "n B K GC *H"]:
    """In: 4 positions of 2 heads, blocks of 3.  Out: positions [0, 1, 2] and [3, -, -] of both."""
    batch, num_kv_heads, _, *rest = grouped.shape
    by_head = grouped.reshape(batch, num_kv_heads, -1, length, *rest)
    padding = [(0, 0)] * 3 + [(0, -length % _QUERIES)] + [(0, 0)] * len(rest)
    blocks = jnp.pad(by_head, padding).reshape(*by_head.shape[:3], -1, _QUERIES, *rest)
    return jnp.moveaxis(blocks, 3, 0).reshape(
        -1, batch, num_kv_heads, blocks.shape[2] * _QUERIES, *rest
    )


def _joined(blocks: Float[Array, "n B K GC *H"], length: int) -> Float[Array, "B K GT *H"]:
    """Undoes `_query_blocks`."""
    num_blocks, batch, num_kv_heads, _, *rest = blocks.shape
    by_head = blocks.reshape(num_blocks, batch, num_kv_heads, -1, _QUERIES, *rest)
    joined = jnp.moveaxis(by_head, 0, 3)
    joined = joined.reshape(*joined.shape[:3], -1, *rest)[:, :, :, :length]
    return joined.reshape(batch, num_kv_heads, -1, *rest)


def _key_blocks(key: Array, value: Array, sight: Sight) -> _Keys:
    """Keys that fill the last block are of no segment."""
    more = -key.shape[2] % KEYS_PER_BLOCK
    key, value = (
        jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))).reshape(
            *x.shape[:2], -1, KEYS_PER_BLOCK, x.shape[3]
        )
        for x in (key, value)
    )
    ids = jnp.pad(sight.key_segment_ids, ((0, 0), (0, more)), constant_values=-1)
    return _Keys(key, value, ids.reshape(ids.shape[0], -1, KEYS_PER_BLOCK))


def _blocks(sight: Sight) -> _Block:
    """Which blocks of keys each block of queries meets.

    In: queries in slots [0, 256) and [256, 512), keys [0, 512) and [512, 1024), one segment.
    Out: order [[0, 1], [0, 1]], num_met [1, 1].
    """
    more = -sight.slots.shape[0] % _QUERIES
    # The last query again: of it, too, the result is a number.
    slots = jnp.pad(sight.slots, (0, more), mode="edge").reshape(-1, _QUERIES)
    ids = _id_blocks(sight.segment_ids, _QUERIES)
    key_ids = _id_blocks(sight.key_segment_ids, KEYS_PER_BLOCK)
    window = jnp.asarray(key_ids.size if sight.window is None else sight.window)
    meet = _near(slots, key_ids.shape[1], window) & _share_segments(ids, key_ids)
    order = jnp.argsort(~meet, axis=1, stable=True)
    windows = jnp.broadcast_to(window, slots.shape[:1])
    return _Block(jnp.moveaxis(ids, 1, 0), slots, order, jnp.sum(meet, axis=1), windows)


def _id_blocks(ids: Int[Array, "B T"], size: int) -> Int[Array, "B blocks C"]:
    more = -ids.shape[1] % size
    return jnp.pad(ids, ((0, 0), (0, more)), mode="edge").reshape(ids.shape[0], -1, size)


def _near(
    slots: Int[Array, "n C"], num_blocks: int, window: Int[Array, ""]
) -> Bool[Array, "n blocks"]:
    """Whether a block of keys is neither behind all the queries nor beyond their windows."""
    first_key = jnp.arange(num_blocks) * KEYS_PER_BLOCK
    last_key = first_key + KEYS_PER_BLOCK - 1
    causal = first_key <= jnp.max(slots, axis=1, keepdims=True)
    return causal & (jnp.min(slots, axis=1, keepdims=True) - last_key < window)


def _share_segments(
    ids: Int[Array, "B n C"], key_ids: Int[Array, "B blocks D"]
) -> Bool[Array, "n blocks"]:
    """Whether ranges of ids overlap in any row: ids grow along a row, up to its padding."""
    lowest, highest = jnp.min(ids, axis=2)[:, :, None], jnp.max(ids, axis=2)[:, :, None]
    overlap = (lowest <= jnp.max(key_ids, axis=2)[:, None]) & (
        highest >= jnp.min(key_ids, axis=2)[:, None]
    )
    return jnp.any(overlap, axis=0)
