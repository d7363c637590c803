"""The one table from logical axes to mesh axes, and the shardings of arrays that follow from it.

Outside jit an array gets a sharding (`sharding`), inside jit a constraint by the mesh in context
(`constrained`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# From least to most communication between devices along the axis. Neighbours on the last axis are
# neighbours in the machine, unless one axis has all devices (layout.py).
AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes it is split over. Axes that are not named are replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("context", "data", "fsdp"),
    "batch": ("data", "fsdp"),  # rows of a batch, before `context` splits each into parts
    "vocab": ("tensor",),
    "model": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def split_axes(mesh: Mesh | AbstractMesh, logical: str | None, size: int) -> tuple[str, ...]:
    """Return the mesh axes that a dimension of `size` is split over; none if they do not divide it.

    In: "rows", 64 on data=2, fsdp=4, context=1, tensor=2.  Out: ("data", "fsdp").
    """
    axes = tuple(name for name in RULES.get(logical or "", ()) if mesh.shape.get(name, 1) > 1)
    return axes if size % math.prod(mesh.shape[name] for name in axes) == 0 else ()


def spec(
    mesh: Mesh | AbstractMesh, logical_axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
    """Return where an array with these logical axes lives.

    A dimension that its mesh axes do not divide is replicated.

    In: ("layers", "model", "mlp"), (28, 3584, 18944) on fsdp=4, tensor=2.
    Out: PartitionSpec(None, "fsdp", "tensor").
    """
    sized = zip(logical_axes, shape, strict=True)
    return PartitionSpec(*(split_axes(mesh, axis, size) or None for axis, size in sized))


def sharding(mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Return `spec` as a sharding on the mesh, for arrays outside jit."""
    return NamedSharding(mesh, spec(mesh, logical_axes, shape))


def constrained(
    x: jax.Array, logical_axes: Sequence[str | None], counted: Sequence[int] | None = None
) -> jax.Array:
    """Constrain `x`, inside jit, to where `spec` puts it on the mesh in context.

    Without a mesh in context `x` is returned as it is.

    Args:
        x: The array.
        logical_axes: A logical axis, or None, for each dimension of `x`.
        counted: Sizes that the mesh axes must divide, where they are not those of `x`: e.g. number
            of heads for a dimension that has all features of all heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    shape = x.shape if counted is None else counted
    return jax.lax.with_sharding_constraint(x, spec(mesh, logical_axes, shape))


def split_heads(
    mesh: Mesh | AbstractMesh, num_heads: int, num_kv_heads: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes that attention splits query heads over, and those for kv heads.

    A device needs the kv head of each of its query heads. Where kv heads are too few to be split,
    every device has them all and reads one. Where devices would read parts of two kv heads, neither
    query nor kv heads are split.
    In: 32 and 8 heads on tensor=4, =16, =3.  Out: both split, query heads only, neither.
    """
    heads = split_axes(mesh, "heads", num_heads)
    kv_heads = split_axes(mesh, "kv_heads", num_kv_heads)
    ways = math.prod(mesh.shape[axis] for axis in heads)
    return (heads, kv_heads) if kv_heads or ways % num_kv_heads == 0 else ((), ())


def row_shards(mesh: Mesh) -> int:
    """Return into how many parts the mesh splits rows."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["rows"])


def context_parts() -> int:
    """Return into how many parts the mesh in context splits each row; see ops/context.py."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def by_row_shard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that each device runs on the rows that it holds.

    Indices into rows may then be numbered within one device, and XLA exchanges nothing. Other mesh
    axes stay with XLA. Without a mesh in context, or where nothing splits the rows, `function` runs
    as it is.

    Args:
        function: Its arguments and results are pytrees of arrays with rows as first axis; scalars
            go to every device. Numbers of rows may differ: prompts beside completions.

    Raises:
        ValueError: the devices divide the rows of some arrays and not of others.
    """

    def run(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        sizes = {x.shape[0] for x in jax.tree.leaves(args) if x.ndim}
        axes, *others = {split_axes(mesh, "rows", size) for size in sizes}
        if others:
            raise ValueError(f"the mesh {dict(mesh.shape)} does not divide all rows of {sizes}")
        if not axes:
            return function(*args)

        def by_axes(tree: Any) -> Any:
            return jax.tree.map(lambda x: PartitionSpec(axes) if x.ndim else PartitionSpec(), tree)

        # Shapes of the results for all rows; only their trees and ranks matter here.
        results = by_axes(jax.eval_shape(function, *args))
        return jax.shard_map(
            function,
            in_specs=by_axes(args),
            out_specs=results,
            axis_names=set(axes),
            check_vma=False,
        )(*args)

    return run
