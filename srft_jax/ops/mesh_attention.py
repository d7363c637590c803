"""Attention over packed rows on a mesh: each device for the rows and the heads that it holds."""

from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from srft_jax.mesh import split_axes, split_heads
from srft_jax.ops import context
from srft_jax.ops.attention import Kernel, Part, ScoreOptions, packed_attention


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
    window: int | None = None,
    *,
    slides: Bool[Array, ""] | None = None,
    parts: int = 1,
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """`packed_attention` on the mesh in context, of rows in `parts` as ops/context.py has them.

    Nothing is exchanged but keys, values and segment ids over `context`.

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

    def attend(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        """Of one device's queries to the keys that they may see."""
        part = None
        if split.heads and not split.kv_heads:
            key, value = (_own_kv_head(x, split.heads) for x in (key, value))
        if parts > 1:
            part = _part(segment_ids, parts)
            key, value = (context.whole_rows(x, axis=2) for x in (key, value))
        return packed_attention(
            *(query, key, value, segment_ids, options, window),
            slides=slides,
            part=part,
            kernel=kernel,
        )

    if mesh.size > 1:  # also where nothing is split: XLA cannot partition a TPU kernel
        of_query = PartitionSpec(split.rows, None, split.heads)
        of_keys = PartitionSpec(split.rows, split.kv_heads)
        attend = jax.shard_map(
            attend,
            in_specs=(of_query, of_keys, of_keys, PartitionSpec(split.rows)),
            out_specs=of_query,
            check_vma=False,
        )
    return attend(query, key, value, segment_ids)


def _part(segment_ids: Int[Array, "b Tn"], parts: int) -> Part:
    """That this device holds."""
    row_length = parts * segment_ids.shape[1]
    return Part(
        slots=context.slots(parts, row_length),
        number=jax.lax.axis_index("context"),
        key_segment_ids=context.whole_rows(segment_ids, axis=1),
    )


def _own_kv_head(x: Float[Array, "b K T H"], axes: tuple[str, ...]) -> Float[Array, "b 1 T H"]:
    """The one that all query heads of this device read.

    In: 8 query heads on tensor=4, 2 kv heads.  Out: on devices 0 and 1 the first.
    """
    devices_per_head = jax.lax.axis_size(axes) // x.shape[1]
    number = jax.lax.axis_index(axes) // devices_per_head
    return jax.lax.dynamic_slice_in_dim(x, number, 1, axis=1)
