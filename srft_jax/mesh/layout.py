"""Meshes: which device stands where, for training and for decoding."""

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from srft_jax.config import MeshConfig, UsageError
from srft_jax.mesh.rules import AXES

_MOST_LISTED = 4


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of all devices, or of these, with the axes of `AXES`; `data` spans slices.

    Where one axis has all devices of a slice, those of a process stand side by side.

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


def _processes_together(arranged: np.ndarray, slices: int) -> np.ndarray:
    """Devices of a process side by side, where one axis has all devices of a slice.

    JAX lays such an axis through the machine line by line (on v5e:4x4 as a ring), across hosts.
    A gather or sum over all of it compiles alike in any order, and nothing here passes parts from
    neighbour to neighbour; but those that share a copy of the parameters while
    decoding (`decode_mesh`) must be of one process.
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


def decode_mesh(mesh: Mesh, tensor: int | None) -> Mesh:
    """The same devices in the same order, `tensor` to a copy of the parameters, the rest replicas.

    Args:
        mesh: As `make_mesh` lays it out.
        tensor: By default `mesh.tensor`.

    Raises:
        UsageError: `tensor` does not divide the number of devices of a process, each of which has
            rows of its own, or a copy would have devices of several processes.
    """
    tensor = mesh.shape["tensor"] if tensor is None else tensor
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
                f"rollout.tensor = {tensor} splits a copy of the parameters over processes on the "
                f"mesh {_written(tuple(mesh.shape.values()))}; lower it, or give one axis of the "
                "mesh all devices of a slice"
            )
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


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
