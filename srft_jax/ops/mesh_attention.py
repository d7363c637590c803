"""Attention over packed rows on a mesh: each device attends for its own rows and heads."""

from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from srft_jax.mesh import split_axes, split_heads
from srft_jax.ops import context
from srft_jax.ops.attention import Kernel, Part, ScoreOptions, packed_attention


class _Split(NamedTuple):
    """Mesh axes that rows, query heads and kv heads are split over."""

    rows: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]


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
    """Return `packed_attention` on the mesh in context.

    Devices exchange only keys, values and segment ids, over the mesh axis `context`.

    The arguments are those of `packed_attention`, and `parts`: into how many parts ops/context.py
    has split each row, 1 for whole rows.

    Raises:
        ValueError: the parts of rows do not lie on `context`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = _Split(
        split_axes(mesh, "rows", query.shape[0]),
        *split_heads(mesh, query.shape[2], key.shape[1]),
    )
    if parts > 1 and ("context" not in split.rows or mesh.shape["context"] != parts):
        raise ValueError(f"{query.shape[0]} rows in {parts} parts do not lie on the mesh {mesh}")

    def attend(query: Array, key: Array, value: Array, segment_ids: Array) -> Array:
        """Attend from one device's queries to the keys that they may see."""
        part = None
        if split.heads and not split.kv_heads:
            # Fewer kv heads than devices along `tensor`: each device has them all and reads one.
            key, value = (_select_kv_head(x, split.heads) for x in (key, value))
        if parts > 1:
            part = _part_here(segment_ids, parts)
            key, value = (context.whole_rows(x, axis=2) for x in (key, value))
        return packed_attention(
            *(query, key, value, segment_ids, options, window),
            slides=slides,
            part=part,
            kernel=kernel,
        )

    if mesh.size > 1:  # also where nothing is split: XLA cannot partition a TPU kernel
        query_spec = PartitionSpec(split.rows, None, split.heads)
        key_spec = PartitionSpec(split.rows, split.kv_heads)
        attend = jax.shard_map(
            attend,
            in_specs=(query_spec, key_spec, key_spec, PartitionSpec(split.rows)),
            out_specs=query_spec,
            check_vma=False,
        )
    return attend(query, key, value, segment_ids)


def _part_here(segment_ids: Int[Array, "b Tn"], parts: int) -> Part:
    """Return the part of rows that this device holds."""
    row_length = parts * segment_ids.shape[1]
    return Part(
        slots=context.slots(parts, row_length),
        number=jax.lax.axis_index("context"),
        key_segment_ids=context.whole_rows(segment_ids, axis=1),
    )


def _select_kv_head(x: Float[Array, "b K T H"], axes: tuple[str, ...]) -> Float[Array, "b 1 T H"]:
    """Return the one kv head that all query heads of this device read.

    In: 8 query heads on tensor=4, 2 kv heads.  Out: the first on devices 0 and 1.
    """
    devices_per_head = jax.lax.axis_size(axes) // x.shape[1]
    number = jax.lax.axis_index(axes) // devices_per_head
    return jax.lax.dynamic_slice_in_dim(x, number, 1, axis=1)
