"""Meshes, and the one table from logical axes to mesh axes."""

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from srft_jax.config import MeshConfig, UsageError

# In the order of how much devices along them exchange, least first: neighbours on the last axis are
# neighbours in the machine.
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

_MOST_LISTED = 4


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices, or of these, with the axes of `AXES`; `data` spans slices.

    Raises:
        UsageError: an axis is below 1, the axes do not multiply to the number of devices, or these
            are of another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    by_process = _processes_are_slices(config, devices)
    shape = mesh_shape(config, len(devices))
    if config.slices == 1:
        # Else libtpu's 2D tori refuse axes that are no product of whole physical ones.
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // config.slices, *shape[1:]),
            (config.slices, 1, 1, 1),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    together = _processes_together(arranged, config.slices)
    return Mesh(together, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _processes_together(arranged: np.ndarray, slices: int) -> np.ndarray:
    """Devices of a process side by side, where one axis has all devices of a slice.

    JAX lays such an axis through the machine line by line, across hosts. What is gathered over all
    of it comes from every device in any order, but neighbours that share a copy of the parameters
    while decoding (`decode_mesh`) must be of one process.
    In: two hosts of 2 x 2 chips, 0 0 1 1 0 0 1 1.  Out: 0 0 0 0 1 1 1 1.
    """
    of_slice = (arranged.shape[0] // slices, *arranged.shape[1:])
    if max(of_slice) < math.prod(of_slice):
        return arranged
    lines = arranged.reshape(slices, -1)
    together = [sorted(line, key=lambda device: device.process_index) for line in lines]
    return np.asarray(together).reshape(arranged.shape)


def flat_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or these, along `fsdp`, of however many slices: for what reads or writes
    parameters once and computes nothing."""
    devices = jax.devices() if devices is None else devices
    arranged = np.asarray(devices).reshape(1, -1, 1, 1)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _processes_are_slices(config: MeshConfig, devices: Sequence[jax.Device]) -> bool:
    """Whether they count as such: where devices do not say what slice they are of.

    Raises:
        UsageError: there are not `mesh.slices` of them.
    """
    if config.slices < 1:
        raise UsageError(f"mesh.slices = {config.slices} is below 1")
    by_process = not hasattr(devices[0], "slice_index")
    if config.slices == 1 and (by_process or devices[0].platform != "tpu"):
        return by_process
    found = len({one.process_index if by_process else one.slice_index for one in devices})
    if found != config.slices:
        what = "processes, which count here," if by_process else "slices of the devices"
        raise UsageError(f"mesh.slices = {config.slices}, but the number of {what} is {found}")
    return by_process


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` on so many devices.

    In: data -1, fsdp 4, context 1, tensor 2, 16 devices.  Out: (2, 4, 1, 2).
    """
    wanted = tuple(vars(config)[axis] for axis in AXES)
    for axis, size in zip(AXES, wanted, strict=True):
        if size < 1 and size != -1:
            raise UsageError(f"mesh.{axis} = {size} is below 1")
    if wanted.count(-1) > 1:
        filled = [f"mesh.{a}" for a, size in zip(AXES, wanted, strict=True) if size == -1]
        raise UsageError(
            f"{' and '.join(filled)} are -1, which one axis alone can be (data is, by default)"
        )
    rest = math.prod(size for size in wanted if size != -1)
    shape = tuple(num_devices // rest if size == -1 else size for size in wanted)
    if math.prod(shape) != num_devices or shape[0] % config.slices:
        raise UsageError(_misfit(wanted, num_devices, config.slices))
    return shape


def _misfit(wanted: Sequence[int], num_devices: int, slices: int) -> str:
    """Why there is no such mesh, and which are nearest."""
    valid = sorted(_valid_shapes(num_devices, slices), key=lambda shape: _distance(wanted, shape))
    of_slices = f" of {slices} slices, which data spans" if slices > 1 else ""
    return (
        f"mesh {_written(wanted)} does not fit {num_devices} devices{of_slices}; the nearest of "
        f"the {len(valid)} that do: {'; '.join(map(_written, valid[:_MOST_LISTED]))}"
    )


def _written(shape: Sequence[int]) -> str:
    """In: (2, 4, 1, 1).  Out: "data=2 x fsdp=4 x context=1 x tensor=1"."""
    return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def _valid_shapes(num_devices: int, slices: int) -> list[tuple[int, ...]]:
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    shapes = itertools.product(divisors, repeat=len(AXES))
    return [shape for shape in shapes if math.prod(shape) == num_devices and shape[0] % slices == 0]


def _distance(wanted: Sequence[int], valid: Sequence[int]) -> float:
    """In factors, over the axes that were asked for."""
    pairs = zip(wanted, valid, strict=True)
    return sum(abs(math.log(size / asked)) for asked, size in pairs if asked != -1)


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


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the same order, `tensor` to a copy of the parameters, the rest replicas.

    Raises:
        UsageError: `tensor` does not divide the number of devices of a process, each of which has
            rows of its own.
    """
    num_devices = mesh.size // jax.process_count()
    if tensor < 1 or num_devices % tensor:
        raise UsageError(
            f"rollout.tensor = {tensor} does not divide the {num_devices} devices of a process"
        )
    shape = (mesh.size // tensor, 1, 1, tensor)
    devices = mesh.devices.reshape(shape)
    for copy in devices.reshape(-1, tensor):
        if len({device.process_index for device in copy}) > 1:
            raise UsageError(
                f"rollout.tensor = {tensor} splits a copy of the parameters over processes in the "
                "order that the mesh has; lower it, or put mesh.tensor within a machine"
            )
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


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


def least_mib_left() -> int | None:
    """Memory that every device of every process still has; None where devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in one for one in stats):
        return None
    least = min(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    return -largest_of_processes(-(least // 2**20))[0]


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
