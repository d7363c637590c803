"""Attention over long rows by XLA: tiles of queries meet tiles of keys in a loop.

Memory is linear in T: the scores of one tile exist at a time, in the backward pass as well, which
computes them again from the output and each query's log-sum-exp. Which tiles meet is read from the
data: tiles of keys of other segments, behind the queries or beyond the window cost nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.attention_scores import masked_scores, matmul, mean_gradient, score_gradients
from srft_jax.ops.attention_terms import ScoreOptions, Sight, TileSizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def looped_attention(
    options: ScoreOptions,
    tiles: TileSizes,
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
) -> Float[Array, "B K GT H"]:
    """Return softmax(score) v, with weights rounded relative to the highest score so far."""
    return _forward(options, tiles, query, key, value, sight)[0]


def _forward(
    options: ScoreOptions, tiles: TileSizes, query: Array, key: Array, value: Array, sight: Sight
) -> tuple[Array, tuple[Any, ...]]:
    length, size = sight.slots.shape[0], tiles.loop_queries
    keys = _key_tiles(key, value, sight, tiles.loop_keys)

    def attend(tile: tuple[Array, QueryTile]) -> tuple[Array, Array]:
        return _attend(*tile, keys, options)

    queries = (_query_tiles(query, length, size), query_tiles(sight, tiles))
    # `model.remat: dots` keeps the two arrays by their names, so that the backward pass computes
    # neither again.
    outs, lses = jax.lax.map(attend, queries)
    out = checkpoint_name(_joined(outs, length, size), "attention")
    lse = checkpoint_name(_joined(lses, length, size), "attention_lse")
    return out, (query, key, value, sight, out, lse)


def _backward(
    options: ScoreOptions, tiles: TileSizes, saved: tuple[Any, ...], d_out: Array
) -> tuple[Array | None, ...]:
    query, key, value, sight, out, lse = saved
    length, num_keys, size = sight.slots.shape[0], key.shape[2], tiles.loop_queries
    keys = _key_tiles(key, value, sight, tiles.loop_keys)
    arrays = (query, mean_gradient(out, d_out), lse, d_out)
    array_tiles = tuple(_query_tiles(x, length, size) for x in arrays)

    def over_queries(
        sums: _KeySums, tile: tuple[tuple[Array, ...], QueryTile]
    ) -> tuple[_KeySums, Array]:
        return _add_gradients(sums, *tile, keys, options)

    # Gradients by keys are summed over tiles of queries, gradients by queries are stacked.
    zeros = _KeySums(*(jnp.zeros(x.shape, jnp.float32) for x in (keys.key, keys.value)))
    sums, d_queries = jax.lax.scan(over_queries, zeros, (array_tiles, query_tiles(sight, tiles)))
    # Without the keys that fill the last tile.
    d_key, d_value = (x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :num_keys] for x in sums)
    d_query = _joined(d_queries, length, size)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


looped_attention.defvjp(_forward, _backward)


class QueryTile(NamedTuple):
    """Sight of a tile of C queries; of n tiles, with their number as first axis.

    Attributes:
        segment_ids: Segment ids of the queries.
        slots: Where in the row the queries stand.
        order: Numbers of all key tiles: first the tiles with keys that a query here may see.
        num_met: How many tiles those are.
        window: Number of slots that a query sees back; the same for all tiles.
    """

    segment_ids: Int[Array, "*n B C"]
    slots: Int[Array, "*n C"]
    order: Int[Array, "*n tiles"]
    num_met: Int[Array, "*n"]
    window: Int[Array, "*n"]


class _KeyTiles(NamedTuple):
    """Keys, values and segment ids of all tiles of C keys."""

    key: Float[Array, "B K tiles C H"]
    value: Float[Array, "B K tiles C H"]
    segment_ids: Int[Array, "B tiles C"]

    def select(self, number: Array, queries: QueryTile) -> tuple[Array, Array, Array]:
        """Return keys and values of one tile, and which of them each query sees."""
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        sight = Sight(
            segment_ids=queries.segment_ids,
            key_segment_ids=take(self.segment_ids, axis=1),
            slots=queries.slots,
            window=queries.window,
        )
        size = self.segment_ids.shape[2]
        mask = sight.mask(number * size + jnp.arange(size))
        return take(self.key, axis=2), take(self.value, axis=2), mask


def _attend(
    query: Float[Array, "B K GC H"], queries: QueryTile, keys: _KeyTiles, options: ScoreOptions
) -> tuple[Float[Array, "B K GC H"], Float[Array, "B K GC"]]:
    """Return the output of a tile of queries, and the log-sum-exp of each query's scores."""

    def add_tile(n: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, total, highest = so_far
        key, value, mask = keys.select(queries.order[n], queries)
        scores = masked_scores(query, key, mask, options)
        # Sums so far are relative to the old highest score: `kept` makes them relative to the new.
        higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(highest - higher)
        total = total * kept + jnp.sum(weights, axis=-1)
        added = matmul("bkqs,bksh->bkqh", weights.astype(value.dtype), value)
        return mixed * kept[..., None] + added, total, higher

    # The loop's length is data: tiles behind `num_met` in the order have nothing to see.
    zeros = jnp.zeros(query.shape, jnp.float32)
    start = (zeros, zeros[..., 0], jnp.full(query.shape[:-1], -jnp.inf))
    mixed, total, highest = jax.lax.fori_loop(0, queries.num_met, add_tile, start)
    return (mixed / total[..., None]).astype(query.dtype), highest + jnp.log(total)


class _KeySums(NamedTuple):
    """Gradients by keys and values, of all tiles, summed over the queries so far."""

    key: Float[Array, "B K tiles C H"]
    value: Float[Array, "B K tiles C H"]


def _add_gradients(
    sums: _KeySums,
    arrays: tuple[Array, ...],
    queries: QueryTile,
    keys: _KeyTiles,
    options: ScoreOptions,
) -> tuple[_KeySums, Float[Array, "B K GC H"]]:
    """Add the gradients of a tile of queries to the sums; return them and the gradient by queries.

    Args:
        sums: Gradients by keys and values so far.
        arrays: The tile's queries, mean gradients, log-sum-exps and gradients by the output.
        queries: Sight of the tile's queries.
        keys: Tiles of all keys.
        options: Scale and cap of the scores.
    """
    query, mean, lse, d_out = arrays

    def add_tile(n: Array, so_far: tuple[Array, _KeySums]) -> tuple[Array, _KeySums]:
        d_query, sums = so_far
        number = queries.order[n]
        key, value, mask = keys.select(number, queries)
        added = score_gradients(query, key, value, mask, mean, lse, d_out, options)
        d_keys = (x.at[:, :, number].add(y) for x, y in zip(sums, added[1:], strict=True))
        return d_query + added[0], _KeySums(*d_keys)

    d_query, sums = jax.lax.fori_loop(
        0, queries.num_met, add_tile, (jnp.zeros(query.shape, jnp.float32), sums)
    )
    return sums, d_query


def _query_tiles(
    grouped: Float[Array, "B K GT *H"], length: int, size: int
) -> Float[Array, "n B K GC *H"]:
    """Cut an array by queries into tiles of `size` positions, each with all G heads.

    In: 4 positions of 2 heads, tiles of 3.  Out: positions [0, 1, 2] and [3, -, -] of both heads.
    """
    batch, num_kv_heads, _, *rest = grouped.shape
    by_head = grouped.reshape(batch, num_kv_heads, -1, length, *rest)
    padding = [(0, 0)] * 3 + [(0, -length % size)] + [(0, 0)] * len(rest)
    tiles = jnp.pad(by_head, padding).reshape(*by_head.shape[:3], -1, size, *rest)
    return jnp.moveaxis(tiles, 3, 0).reshape(-1, batch, num_kv_heads, tiles.shape[2] * size, *rest)


def _joined(
    tiles: Float[Array, "n B K GC *H"], length: int, size: int
) -> Float[Array, "B K GT *H"]:
    """Undo `_query_tiles`."""
    num_tiles, batch, num_kv_heads, _, *rest = tiles.shape
    by_head = tiles.reshape(num_tiles, batch, num_kv_heads, -1, size, *rest)
    joined = jnp.moveaxis(by_head, 0, 3)
    joined = joined.reshape(*joined.shape[:3], -1, *rest)[:, :, :, :length]
    return joined.reshape(batch, num_kv_heads, -1, *rest)


def _key_tiles(key: Array, value: Array, sight: Sight, size: int) -> _KeyTiles:
    """Cut keys and values into tiles; keys that fill the last tile belong to no segment."""
    more = -key.shape[2] % size
    key, value = (
        jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))).reshape(*x.shape[:2], -1, size, x.shape[3])
        for x in (key, value)
    )
    ids = jnp.pad(sight.key_segment_ids, ((0, 0), (0, more)), constant_values=-1)
    return _KeyTiles(key, value, ids.reshape(ids.shape[0], -1, size))


def query_tiles(sight: Sight, tiles: TileSizes) -> QueryTile:
    """Return for each tile of queries which tiles of keys it meets.

    In: queries in slots [0, 256) and [256, 512), keys [0, 512) and [512, 1024), one segment.
    Out: order [[0, 1], [0, 1]], num_met [1, 1].
    """
    more = -sight.slots.shape[0] % tiles.loop_queries
    # The last query fills the last tile: its result is a number there, too, and cut off later.
    slots = jnp.pad(sight.slots, (0, more), mode="edge").reshape(-1, tiles.loop_queries)
    ids = _id_tiles(sight.segment_ids, tiles.loop_queries)
    key_ids = _id_tiles(sight.key_segment_ids, tiles.loop_keys)
    # Without a window, one that is longer than any row.
    window = jnp.asarray(key_ids.size if sight.window is None else sight.window)
    near = _near(slots, key_ids.shape[1], tiles.loop_keys, window)
    # Both conditions may let a tile through that has nothing to see; the mask decides per key.
    meet = near & _share_segments(ids, key_ids)
    order = jnp.argsort(~meet, axis=1, stable=True)
    windows = jnp.broadcast_to(window, slots.shape[:1])
    return QueryTile(jnp.moveaxis(ids, 1, 0), slots, order, jnp.sum(meet, axis=1), windows)


def _id_tiles(ids: Int[Array, "B T"], size: int) -> Int[Array, "B tiles C"]:
    more = -ids.shape[1] % size
    return jnp.pad(ids, ((0, 0), (0, more)), mode="edge").reshape(ids.shape[0], -1, size)


def _near(
    slots: Int[Array, "n C"], num_tiles: int, size: int, window: Int[Array, ""]
) -> Bool[Array, "n tiles"]:
    """Return whether a tile of keys is neither behind all queries nor beyond their windows."""
    first_key = jnp.arange(num_tiles) * size
    last_key = first_key + size - 1
    # The last query decides causality, the first query how far back the window reaches.
    causal = first_key <= jnp.max(slots, axis=1, keepdims=True)
    return causal & (jnp.min(slots, axis=1, keepdims=True) - last_key < window)


def _share_segments(
    ids: Int[Array, "B n C"], key_ids: Int[Array, "B tiles D"]
) -> Bool[Array, "n tiles"]:
    """Return whether ranges of ids overlap in any row: ids grow along a row, up to its padding."""
    lowest, highest = jnp.min(ids, axis=2)[:, :, None], jnp.max(ids, axis=2)[:, :, None]
    overlap = (lowest <= jnp.max(key_ids, axis=2)[:, None]) & (
        highest >= jnp.min(key_ids, axis=2)[:, None]
    )
    return jnp.any(overlap, axis=0)
