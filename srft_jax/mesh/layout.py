"""Making meshes: which device stands where, for training and for decoding."""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from srft_jax.config import MeshConfig, UsageError
from srft_jax.mesh.rules import AXES

# How many meshes that would fit an error names.
_MOST_LISTED = 4


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the axes of `AXES`; `data` spans slices.

    Where one axis has all devices of a slice, the devices of a process stand side by side.

    Args:
        config: Sizes of the axes, and the number of slices.
        devices: Devices of the mesh; by default all.

    Raises:
        UsageError: an axis is below 1, the axes do not multiply to the number of devices, or the
            devices are of another number of slices.
    """
    devices = jax.devices() if devices is None else devices
    by_process = _processes_are_slices(config, devices)
    shape = mesh_shape(config, len(devices))
    if config.slices == 1:
        # Without splitting, 2D tori refuse axes that are no product of whole physical axes.
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        # Only `data` spans slices: its devices exchange least, and slices have slow links.
        arranged = mesh_utils.create_hybrid_device_mesh(
            mesh_shape=(shape[0] // config.slices, *shape[1:]),
            dcn_mesh_shape=(config.slices, 1, 1, 1),
            devices=devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    arranged = _processes_together(arranged, config.slices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _processes_are_slices(config: MeshConfig, devices: Sequence[jax.Device]) -> bool:
    """Return whether each process counts as a slice: where devices do not tell their slice.

    Raises:
        UsageError: `mesh.slices` is not the number of slices.
    """
    if config.slices < 1:
        raise UsageError(f"mesh.slices = {config.slices} is below 1")
    by_process = not hasattr(devices[0], "slice_index")
    if config.slices == 1 and (by_process or devices[0].platform != "tpu"):
        # Processes, or GPU machines, may be laid out as one slice; TPU slices may not.
        return by_process
    number = len({d.process_index if by_process else d.slice_index for d in devices})
    if number != config.slices:
        what = "processes, which count here," if by_process else "slices of the devices"
        raise UsageError(f"mesh.slices = {config.slices}, but the number of {what} is {number}")
    return by_process


def _processes_together(arranged: np.ndarray, slices: int) -> np.ndarray:
    """Put devices of a process side by side, where one axis has all devices of a slice.

    JAX lays such an axis through the machine line by line (on v5e:4x4 as a ring), across hosts.
    A gather or sum over the whole axis compiles alike in any order, and nothing here passes parts
    from neighbour to neighbour. But the devices that share a copy of the parameters while decoding
    (`decode_mesh`) must belong to one process.
    In: processes 0 0 1 1 0 0 1 1 (two hosts of 2 x 2 chips).  Out: 0 0 0 0 1 1 1 1.
    """
    slice_shape = (arranged.shape[0] // slices, *arranged.shape[1:])
    if max(slice_shape) < math.prod(slice_shape):
        return arranged  # several axes share a slice: they stay as JAX lays them
    lines = arranged.reshape(slices, -1)
    sorted_lines = [sorted(line, key=lambda device: device.process_index) for line in lines]
    return np.asarray(sorted_lines).reshape(arranged.shape)


def flat_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of all devices, or of `devices`, along `fsdp`, whatever slices they are of.

    It is for reading and writing parameters, which computes nothing.
    """
    devices = jax.devices() if devices is None else devices
    arranged = np.asarray(devices).reshape(1, -1, 1, 1)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def decode_mesh(mesh: Mesh, tensor: int | None) -> Mesh:
    """Make a mesh of the same devices, each `tensor` of which share a copy of the parameters.

    Devices keep their order; `data` is the number of copies.
    In: data=1, fsdp=8, context=1, tensor=1; tensor 2.  Out: data=4, fsdp=1, context=1, tensor=2.

    Args:
        mesh: A mesh from `make_mesh`.
        tensor: Number of devices that share a copy; by default the mesh's own `tensor`.

    Raises:
        UsageError: `tensor` does not divide the number of devices of a process (each process has
            rows of its own), or a copy would have devices of several processes.
    """
    tensor = mesh.shape["tensor"] if tensor is None else tensor
    num_devices = mesh.size // jax.process_count()
    if tensor < 1 or num_devices % tensor:
        raise UsageError(
            f"rollout.tensor = {tensor} does not divide the {num_devices} devices of a process"
        )
    # Neighbours in the mesh's order share a copy, so `tensor` must be the last axis.
    shape = (mesh.size // tensor, 1, 1, tensor)
    devices = mesh.devices.reshape(shape)
    for copy in devices.reshape(-1, tensor):
        if len({device.process_index for device in copy}) > 1:
            raise UsageError(
                f"rollout.tensor = {tensor} splits a copy of the parameters over processes on the "
                f"mesh {_written(tuple(mesh.shape.values()))}; lower it, or give one axis of the "
                "mesh all devices of a slice"
            )
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Return the sizes of `AXES` on this number of devices; -1 takes what the other axes leave.

    In: data -1, fsdp 4, context 1, tensor 2, 16 devices.  Out: (2, 4, 1, 2).

    Raises:
        UsageError: the axes do not fit the number of devices; it names the nearest that do.
    """
    asked = tuple(vars(config)[axis] for axis in AXES)
    for axis, size in zip(AXES, asked, strict=True):
        if size < 1 and size != -1:
            raise UsageError(f"mesh.{axis} = {size} is below 1")
    if asked.count(-1) > 1:
        filled = [f"mesh.{a}" for a, size in zip(AXES, asked, strict=True) if size == -1]
        raise UsageError(
            f"{' and '.join(filled)} are -1, which one axis alone can be (data is, by default)"
        )
    # If the asked sizes do not divide the devices, the product below does not come out.
    rest = math.prod(size for size in asked if size != -1)
    shape = tuple(num_devices // rest if size == -1 else size for size in asked)
    if math.prod(shape) != num_devices or shape[0] % config.slices:
        raise UsageError(_misfit(asked, num_devices, config.slices))
    return shape


def _misfit(asked: Sequence[int], num_devices: int, slices: int) -> str:
    """Return the error's text: there is no such mesh, and which ones are nearest."""
    valid = sorted(valid_shapes(num_devices, slices), key=lambda shape: _distance(asked, shape))
    in_slices = f" of {slices} slices, which data spans" if slices > 1 else ""
    return (
        f"mesh {_written(asked)} does not fit {num_devices} devices{in_slices}; the nearest of "
        f"the {len(valid)} that do: {'; '.join(map(_written, valid[:_MOST_LISTED]))}"
    )


def _written(shape: Sequence[int]) -> str:
    """In: (2, 4, 1, 1).  Out: "data=2 x fsdp=4 x context=1 x tensor=1"."""
    return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def valid_shapes(num_devices: int, slices: int) -> list[tuple[int, ...]]:
    """Return all sizes of `AXES` that multiply to `num_devices`; `slices` divides `data`."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    shapes = itertools.product(divisors, repeat=len(AXES))
    return [shape for shape in shapes if math.prod(shape) == num_devices and shape[0] % slices == 0]


def _distance(asked: Sequence[int], valid: Sequence[int]) -> float:
    """Return the sum of |log(size / asked size)| over the axes that were asked for.

    In: (1, 3, 1, 1), (1, 4, 1, 2).  Out: log(4 / 3) + log 2.
    """
    pairs = zip(asked, valid, strict=True)
    return sum(abs(math.log(size / asked_size)) for asked_size, size in pairs if asked_size != -1)
