"""Meshes of devices, logical axes on them, and exchange between processes."""

from srft_jax.mesh.exchange import (
    gathered,
    largest_of_processes,
    least_mib_left,
    placed,
    rows_of_all,
    rows_of_process,
)
from srft_jax.mesh.layout import decode_mesh, flat_mesh, make_mesh, mesh_shape
from srft_jax.mesh.rules import (
    AXES,
    RULES,
    by_row_shard,
    constrained,
    context_parts,
    row_shards,
    sharding,
    spec,
    split_axes,
    split_heads,
)

__all__ = [
    "AXES",
    "RULES",
    "by_row_shard",
    "constrained",
    "context_parts",
    "decode_mesh",
    "flat_mesh",
    "gathered",
    "largest_of_processes",
    "least_mib_left",
    "make_mesh",
    "mesh_shape",
    "placed",
    "row_shards",
    "rows_of_all",
    "rows_of_process",
    "sharding",
    "spec",
    "split_axes",
    "split_heads",
]
