"""The KV cache on the device: made empty, filled with prompts, settled, resized."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from srft_jax.batch import KVCache
from srft_jax.config import ModelConfig
from srft_jax.mesh import by_row_shard, constrained


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Sizes of a cache; rows and prompts count over all devices.

    Attributes:
        rows: Completions decoded side by side, R.
        prompts: Prompts kept, P.
        lanes: Most rows of a prompt, G.
        prompt_capacity: Tokens of a prompt, S.
        capacity: A row's own tokens of earlier segments, C; none in the first.
        segment: Tokens of the segment at hand, U.
    """

    rows: int
    prompts: int
    lanes: int
    prompt_capacity: int
    capacity: int
    segment: int


def empty_cache(config: ModelConfig, shape: CacheShape, dtype: str) -> KVCache:
    """Return zeros of this shape."""
    layers = range(config.num_layers)

    def keys(rows: int, length: int) -> tuple[Array, ...]:
        size = (rows, config.num_kv_heads, config.head_dim, length)
        return tuple(jnp.zeros(size, dtype) for _ in layers)

    def values(rows: int, length: int) -> tuple[Array, ...]:
        size = (rows, config.num_kv_heads, length, config.head_dim)
        return tuple(jnp.zeros(size, dtype) for _ in layers)

    return KVCache(
        prompt_keys=keys(shape.prompts, shape.prompt_capacity),
        prompt_values=values(shape.prompts, shape.prompt_capacity),
        keys=keys(shape.rows, shape.capacity),
        values=values(shape.rows, shape.capacity),
        recent_keys=keys(shape.rows, shape.segment),
        recent_values=values(shape.rows, shape.segment),
        prompt_lengths=jnp.zeros((shape.prompts,), jnp.int32),
        lengths=jnp.zeros((shape.rows,), jnp.int32),
        num_recent=jnp.zeros((), jnp.int32),
        row_of_lane=jnp.zeros((shape.prompts, shape.lanes), jnp.int32),
        lane_of_row=jnp.zeros((shape.rows,), jnp.int32),
    )


def on_shards(tree: Any) -> Any:
    """Split rows and prompts, which come first, over data; kv heads, which come next, over tensor.

    What a program returns or carries through a loop must say so: left to itself XLA replicates
    what is empty, and splits rows over tensor as a draw does, which moves the cache at every step.
    """

    return jax.tree.map(lambda x: constrained(x, shard_axes(x)), tree)


def shard_axes(x: Array | jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
    """Return logical axes of an array of the sampler's state: a cache has four, others fewer."""
    return ("rows", "kv_heads", None, None) if x.ndim == 4 else ("rows", None)[: x.ndim]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheWrites:
    """Copies of n prompts out of packed rows [B, T] into prompt slots of the cache.

    Rows and slots are numbered within one device. Unused entries come last and name a slot that no
    cache has.
    """

    row: Int[Array, " n"]
    start: Int[Array, " n"]
    length: Int[Array, " n"]
    prompt_slot: Int[Array, " n"]


def put_prompts(
    prompt_keys: tuple[Float[Array, "P K H S"], ...],
    prompt_values: tuple[Float[Array, "P K S H"], ...],
    keys: Float[Array, "L B K T H"],
    values: Float[Array, "L B K T H"],
    writes: CacheWrites,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return `prompt_keys` and `prompt_values` with prompts cut out of packed rows put in."""
    layers = range(len(prompt_keys))
    packed = tuple(tuple(x[layer] for layer in layers) for x in (keys, values))
    return by_row_shard(_put)(writes, (prompt_keys, prompt_values), packed)


def _put(
    writes: CacheWrites,
    prompts: tuple[tuple[Array, ...], tuple[Array, ...]],
    packed: tuple[tuple[Array, ...], tuple[Array, ...]],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Loop over the prompts there are, however many writes there could be."""
    num_prompt_slots, _, capacity, _ = prompts[1][0].shape

    def write(order: tuple[int, ...], number: Array, stored: Array, packed: Array) -> Array:
        # Past a prompt's end stands whatever comes next in its row: never attended to.
        columns = writes.start[number] + jnp.arange(capacity)
        cut = jnp.take(packed[writes.row[number]], columns, axis=1, mode="clip")  # [K S H]
        return _written(stored, cut.transpose(order)[None], {0: writes.prompt_slot[number]})

    def put_one(number: Array, prompts: tuple[Any, Any]) -> tuple[Any, ...]:
        (keys, values), (packed_keys, packed_values) = prompts, packed
        put_keys = functools.partial(write, (0, 2, 1), number)  # keys have their tokens last
        put_values = functools.partial(write, (0, 1, 2), number)
        return (
            jax.tree.map(put_keys, keys, packed_keys),
            jax.tree.map(put_values, values, packed_values),
        )

    return jax.lax.fori_loop(0, jnp.sum(writes.prompt_slot < num_prompt_slots), put_one, prompts)


def settle(cache: KVCache) -> KVCache:
    """Append the last segment's keys and values to each row's own cache.

    A row must have room for the used columns of the recent part, and own parts are at least as long
    as the recent one; own parts without any room stay empty.
    """
    num_recent = cache.num_recent
    cache = dataclasses.replace(cache, num_recent=jnp.zeros_like(cache.num_recent))
    if not cache.values[0].shape[2]:
        return cache
    start = jnp.maximum(cache.lengths - num_recent, 0)
    own, recent = (cache.keys, cache.values), (cache.recent_keys, cache.recent_values)
    keys, values = by_row_shard(_settle)(start, own, recent)
    return dataclasses.replace(cache, keys=keys, values=values)


def _settle(start: Array, own: Any, recent: Any) -> Any:
    """Loop over rows once for all layers: a scatter is a loop of its own on a TPU, and slow."""

    def write(axis: int, number: Array, own: Array, recent: Array) -> Array:
        new = jax.lax.dynamic_slice_in_dim(recent, number, 1)
        size = new.shape[axis]
        # A slice cannot reach past the end: write the last U columns, old tokens first.
        # In: own [0 1 2 3 4 5 _ _], recent [c d - -], start 6.  Out: columns 4 to 7 = [4 5 c d].
        first = jnp.minimum(start[number], own.shape[axis] - size)
        where = {0: number, axis: first}
        old = jax.lax.dynamic_slice(own, _from(own, where), new.shape)
        late = start[number] - first
        columns = jax.lax.broadcasted_iota(jnp.int32, new.shape, axis)
        new = jnp.where(columns < late, old, jnp.roll(new, late, axis).astype(own.dtype))
        return _written(own, new, where)

    def append_to_row(number: Array, own: tuple[Any, Any]) -> tuple[Any, ...]:
        (keys, values), (recent_keys, recent_values) = own, recent
        append_keys = functools.partial(write, 3, number)  # axis of the tokens
        append_values = functools.partial(write, 2, number)
        return (
            jax.tree.map(append_keys, keys, recent_keys),
            jax.tree.map(append_values, values, recent_values),
        )

    return jax.lax.fori_loop(0, start.shape[0], append_to_row, own)


def _written(x: Array, part: Array, start: dict[int, Array]) -> Array:
    """`x` with `part` from the given index of each axis on, from 0 where none is given."""
    # Without the barrier libtpu 0.0.42 fails to compile the loops, which it takes for copies.
    part = jax.lax.optimization_barrier(part.astype(x.dtype))
    return jax.lax.dynamic_update_slice(x, part, _from(x, start))


def _from(x: Array, start: dict[int, Array]) -> list[Any]:
    return [start.get(axis, 0) for axis in range(x.ndim)]


def resized(cache: KVCache, prompt_capacity: int, capacity: int) -> KVCache:
    """Return the same tokens in a cache of other capacities, made one leaf after the other.

    No more than one leaf is held twice, as the old one is deleted. Tokens past a smaller capacity
    are cut off.
    """
    sizes = dict(prompt_keys=(3, prompt_capacity), prompt_values=(2, prompt_capacity))
    sizes |= dict(keys=(3, capacity), values=(2, capacity))
    changes: dict[str, Any] = {}
    for name, (axis, size) in sizes.items():
        leaves = list(getattr(cache, name))
        for layer in range(len(leaves)):
            old = leaves[layer]
            if old.shape[axis] != size:
                leaves[layer] = _resized(old, axis, size)
                old.delete()
        changes[name] = tuple(leaves)
    return dataclasses.replace(cache, **changes)


def with_more_rows(cache: KVCache, *, rows: int, prompts: int, shards: int) -> KVCache:
    """Return the cache with room for more rows and prompts, made one leaf after the other.

    No more than one leaf is held twice, as the old one is deleted. The host makes the index of the
    cache anew before each segment.

    Args:
        cache: As it is.
        rows: Rows of each shard.
        prompts: Prompts of each shard.
        shards: Parts that rows are split into.
    """
    sizes = {"prompt_keys": prompts, "prompt_values": prompts, "keys": rows, "values": rows}
    sizes |= {"recent_keys": rows, "recent_values": rows}
    grown: dict[str, Any] = {
        name: tuple(grown_by_shard(leaf, size, shards) for leaf in getattr(cache, name))
        for name, size in sizes.items()
    }
    return dataclasses.replace(cache, **grown)


def grown_by_shard(x: Array, size: int, shards: int) -> Array:
    """Return `x` with zeros at the end of axis 0 of each shard, `size` there; `x` is deleted."""
    num_new = size - x.shape[0] // shards
    if not num_new:
        return x
    grown = _padded_by_shard(x, num_new=num_new)
    x.delete()
    return grown


@functools.partial(jax.jit, static_argnames=("num_new",))
def _padded_by_shard(x: Array, *, num_new: int) -> Array:
    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, num_new), *[(0, 0)] * (x.ndim - 1)])

    return on_shards(by_row_shard(pad)(x))


@functools.partial(jax.jit, static_argnames=("axis", "size"))
def _resized(x: Array, axis: int, size: int) -> Array:
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), axis=axis)
    return on_shards(
        jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
    )
