"""The one table from logical axes to mesh axes, and what follows from it for arrays.

Outside jit a sharding, inside a constraint by the mesh in context.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# In the order of how much devices along them exchange, least first: neighbours on the last axis are
# neighbours in the machine, unless one axis has all of them (layout.py).
AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes it is split over. What is not named is replicated.
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
    """Mesh axes that a dimension of `size` is split over; none where they do not divide it.

    In: "rows", 64 on data=2, fsdp=4, context=1, tensor=2.  Out: ("data", "fsdp").
    """
    axes = tuple(name for name in RULES.get(logical or "", ()) if mesh.shape.get(name, 1) > 1)
    return axes if size % math.prod(mesh.shape[name] for name in axes) == 0 else ()


def spec(
    mesh: Mesh | AbstractMesh, logical_axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
    """Where an array with these logical axes lives; an axis that does not divide is replicated.

    In: ("layers", "model", "mlp"), (28, 3584, 18944) on fsdp=4, tensor=2.
    Out: PartitionSpec(None, "fsdp", "tensor").
    """
    sized = zip(logical_axes, shape, strict=True)
    return PartitionSpec(*(split_axes(mesh, axis, size) or None for axis, size in sized))


def sharding(mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The same for arrays outside jit."""
    return NamedSharding(mesh, spec(mesh, logical_axes, shape))


def constrained(
    x: jax.Array, logical_axes: Sequence[str | None], counted: Sequence[int] | None = None
) -> jax.Array:
    """Inside jit: `x` where `spec` says on the mesh in context; without a mesh, `x` as it is.

    `counted` is its shape by what must divide, e.g. heads, where that is not its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    shape = x.shape if counted is None else counted
    return jax.lax.with_sharding_constraint(x, spec(mesh, logical_axes, shape))


def split_heads(
    mesh: Mesh | AbstractMesh, num_heads: int, num_kv_heads: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that attention splits query heads over, and kv heads.

    A device needs the kv head of each of its query heads. Where kv heads are too few to be split,
    every device has them all and reads one; where that does not come out even, none are split.
    In: 32 and 8 heads on tensor=4, =16, =3.  Out: both split, query heads only, neither.
    """
    heads = split_axes(mesh, "heads", num_heads)
    kv_heads = split_axes(mesh, "kv_heads", num_kv_heads)
    ways = math.prod(mesh.shape[axis] for axis in heads)
    return (heads, kv_heads) if kv_heads or ways % num_kv_heads == 0 else ((), ())


def row_shards(mesh: Mesh) -> int:
    """Into how many parts rows are split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["rows"])


def context_parts() -> int:
    """Into how many parts the mesh in context splits each row of a batch, see ops/context.py."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1)


def by_row_shard(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays with rows in front, run by each device on the rows that it holds.

    So indices into rows may be numbered within one device, and XLA exchanges nothing. Arguments and
    results are pytrees; scalars go to every device. Other axes stay with XLA. Without a mesh in
    context, or where nothing splits the rows, it is the function itself.
    """

    def run(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        num_rows = next(x.shape[0] for x in jax.tree.leaves(args) if x.ndim)
        axes = split_axes(mesh, "rows", num_rows)
        if not axes:
            return function(*args)

        def by_axes(tree: Any) -> Any:
            return jax.tree.map(lambda x: PartitionSpec(axes) if x.ndim else PartitionSpec(), tree)

        results = by_axes(jax.eval_shape(function, *args))
        return jax.shard_map(
            function,
            in_specs=by_axes(args),
            out_specs=results,
            axis_names=set(axes),
            check_vma=False,
        )(*args)

    return run
