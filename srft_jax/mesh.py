"""Meshes, and the one table from logical axes to mesh axes."""

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from srft_jax.config import MeshConfig, UsageError

# Logical axis -> mesh axes it is split over. What is not named is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "vocab": ("tensor",),
    "model": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh of all devices with axes data, fsdp, tensor.

    Raises:
        UsageError: an axis is below 1, or they do not multiply to the number of devices.
    """
    for axis, size in vars(config).items():
        if size < 1 and (axis, size) != ("data", -1):
            raise UsageError(f"mesh.{axis} = {size} is below 1")
    num_devices = jax.device_count()
    rest = config.fsdp * config.tensor
    data = num_devices // rest if config.data == -1 else config.data
    if data * rest != num_devices:
        raise UsageError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} "
            f"does not fit {num_devices} devices"
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def split_axes(mesh: Mesh | AbstractMesh, logical: str | None, size: int) -> tuple[str, ...]:
    """Mesh axes that a dimension of `size` is split over; none where they do not divide it.

    In: "rows", 64 on data=2, fsdp=4, tensor=2.  Out: ("data", "fsdp").
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


def constrained(x: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
    """Inside jit: `x` where `spec` says on the mesh in context; without a mesh, `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, logical_axes, x.shape))


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


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices, `tensor` to a copy of the parameters, the rest replicas.

    In the same order, but those of a process side by side, whatever axis it was split along.

    Raises:
        UsageError: `tensor` does not divide the number of devices of a process, each of which has
            rows of its own.
    """
    num_devices = mesh.size // jax.process_count()
    if tensor < 1 or num_devices % tensor:
        raise UsageError(
            f"rollout.tensor = {tensor} does not divide the {num_devices} devices of a process"
        )
    shape = (mesh.size // tensor, 1, tensor)
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    return Mesh(np.reshape(devices, shape), mesh.axis_names, axis_types=mesh.axis_types)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts rows are split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["rows"])


def rows_of_process(array: jax.Array) -> np.ndarray:
    """Those rows, in order, that devices of this process hold."""
    if array.is_fully_replicated:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def rows_of_all(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays [rows of this process, ...] as parts of arrays over all processes, by rows."""
    if mesh is None:
        return tree
    where = NamedSharding(mesh, PartitionSpec(RULES["rows"]))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), tree)


def largest_of_processes(*values: int) -> tuple[int, ...]:
    """Each value's maximum over processes, which must all call this: so they decide alike."""
    if jax.process_count() == 1:
        return values
    gathered = multihost_utils.process_allgather(np.asarray(values, np.int32))
    return tuple(int(value) for value in gathered.max(axis=0))


def placed(tree: Any, shardings: Any) -> Any:
    """Host arrays that are the same in every process, each on its sharding."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(place, tree, shardings)


# Bytes of a process that are exchanged at a time: the devices hold as many of every process.
_LARGEST_BLOCK = 2**22


def gathered(value: Any) -> list[Any]:
    """The values that all processes call this with, in their order; anything that pickle takes.

    In blocks of few sizes, for each of which a program compiles.
    """
    if jax.process_count() == 1:
        return [value]
    data = pickle.dumps(value)
    (longest,) = largest_of_processes(len(data))
    size = min(1 << (longest - 1).bit_length(), _LARGEST_BLOCK)
    parts = [bytearray() for _ in range(jax.process_count())]
    for start in range(0, longest, size):
        block = data[start : start + size].ljust(size, b"\0")
        received = multihost_utils.process_allgather(np.frombuffer(block, np.uint8))
        for part, of_process in zip(parts, received, strict=True):
            part += of_process.tobytes()
    return [pickle.loads(part) for part in parts]  # which does not look at the zeros behind
