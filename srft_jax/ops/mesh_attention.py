"""Attention over packed rows on a mesh: each device for the rows and the heads that it holds."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from srft_jax.mesh import split_axes, split_heads
from srft_jax.ops import context
from srft_jax.ops.attention import ScoreOptions, packed_attention


class _Split(NamedTuple):
    """Mesh axes that rows, query heads and kv heads are split over, and the parts of a row."""

    rows: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    parts: int


def mesh_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"],
    options: ScoreOptions,
    window: int | Int[Array, ""] | None = None,
    *,
    parts: int = 1,
) -> Float[Array, "B T N H"]:
    """`packed_attention` on the mesh in context, with rows in `parts` as ops/context.py has them.

    Keys and values are gathered over `context`, and exchanged for nothing else; their gradients
    are summed where they came from.

    Raises:
        ValueError: the parts of rows do not lie on `context`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = _Split(
        split_axes(mesh, "rows", query.shape[0]),
        *split_heads(mesh, query.shape[2], key.shape[1]),
        parts,
    )
    if parts > 1 and ("context" not in split.rows or mesh.shape["context"] != parts):
        raise ValueError(f"{query.shape[0]} rows in {parts} parts do not lie on the mesh {mesh}")
    attend = functools.partial(_attend, split, options, window)
    if split.rows or split.heads:
        of_query = PartitionSpec(split.rows, None, split.heads)
        of_keys = PartitionSpec(split.rows, split.kv_heads)
        attend = jax.shard_map(
            attend,
            in_specs=(of_query, of_keys, of_keys, PartitionSpec(split.rows)),
            out_specs=of_query,
            check_vma=False,
        )
    return attend(query, key, value, segment_ids)


def _attend(
    split: _Split,
    options: ScoreOptions,
    window: int | Array | None,
    query: Float[Array, "b Tn n H"],
    key: Float[Array, "b k Tn H"],
    value: Float[Array, "b k Tn H"],
    segment_ids: Int[Array, "b Tn"],
) -> Float[Array, "b Tn n H"]:
    """One device's queries, with the keys that they may see."""
    if split.heads and not split.kv_heads:
        key, value = (_own_kv_head(x, query.shape[2], split.heads) for x in (key, value))
    length = segment_ids.shape[1]
    slots = jnp.arange(length)
    if split.parts == 1:
        whole = key, value, segment_ids, slots
    else:
        row_length = split.parts * length
        slots = context.slots_of_part(jax.lax.axis_index("context"), split.parts, row_length)
        whole = (
            *(context.gathered(x, axis=2) for x in (key, value)),
            context.gathered(segment_ids, axis=1),
            jnp.arange(row_length),
        )
    key, value, key_segments, key_slots = whole
    return packed_attention(
        query, key, value, segment_ids, key_segments, slots, key_slots, options, window
    )


def _own_kv_head(
    x: Float[Array, "b K T H"], num_queries: int, axes: tuple[str, ...]
) -> Float[Array, "b 1 T H"]:
    """The one that all query heads of this device read.

    In: 8 query heads on tensor=4, 2 kv heads.  Out: of devices 0 and 1 the first.
    """
    devices_per_head = jax.lax.axis_size(axes) // x.shape[1]
    number = jax.lax.axis_index(axes) // devices_per_head
    return jax.lax.dynamic_slice_in_dim(x, number, 1, axis=1)
