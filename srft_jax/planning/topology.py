"""Devices that need not exist here, and the rate at which groups of them exchange."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from srft_jax.config import UsageError
from srft_jax.planning.chips import CHIPS, Chip
from srft_jax.planning.hlo.device_groups import Group


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one slice, or of several of the same sizes.

    Attributes:
        name: Kind and sizes of a slice, e.g. v5p:4x4x4.
        chip: Figures of each device.
        sizes: Chips of a slice along each axis.
        devices: Devices for a mesh; fake ones on the CPU for GPUs, which nothing compiles for here.
        slices: Number of slices, joined by the data-centre network.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: tuple[Any, ...]
    slices: int = 1

    def ordered(self, mesh: Mesh) -> "Topology":
        """Return the topology with its devices in the mesh's order."""
        return dataclasses.replace(self, devices=tuple(mesh.devices.flat))


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Split a topology's name.  In: "v5p:4x4x4".  Out: "v5p", (4, 4, 4).

    Raises:
        UsageError: the name has another form, or a chip that is not in the table.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise UsageError(
            f"plan.topology = {name} is not of the form v5p:4x4x4, cpu:8 or h100:8, with one of "
            f"{', '.join(CHIPS)}"
        )
    return match[1], tuple(map(int, match[2].split("x")))


# Answers to what libtpu would look for on this machine, with complaints if it has no TPU. Several
# processes may load it, as none touches a chip.
_LIBTPU_VARIABLES = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
}


def prepare_backend(name: str) -> None:
    """Set JAX up on the CPU, with the fake devices of a topology, before JAX is used.

    The cache of compiled programs is off: programs for a topology cannot be read back. libtpu is
    told that there is no TPU, unless the environment says otherwise.

    Raises:
        UsageError: see `parse_topology`.
    """
    chip, sizes = parse_topology(name)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if CHIPS[chip].kind == "tpu":
        for variable, value in _LIBTPU_VARIABLES.items():
            os.environ.setdefault(variable, value)
    else:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes))


def find_topology(name: str, slices: int = 1) -> Topology:
    """Return the devices of so many slices; call `prepare_backend` before.

    Raises:
        UsageError: there is no such slice, or no compiler for it.
    """
    kind, sizes = parse_topology(name)
    chip = CHIPS[kind]
    if chip.kind == "tpu":
        return Topology(name, chip, sizes, _tpu_devices(name, chip, slices), slices)
    if slices != 1:
        raise UsageError(
            f"mesh.slices = {slices}: several slices can be planned for TPUs only, not for {name}"
        )
    return Topology(name, chip, sizes, _cpu_devices(name, math.prod(sizes)))


def _tpu_devices(name: str, chip: Chip, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"plan.topology = {name} is compiled by libtpu, which runs on any machine but is not "
            "installed: pip install 'srft_jax[tpu]'"
        )
    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    if slices > 1:  # libtpu numbers the slices only when it is asked for several
        options["num_slices"] = slices
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return tuple(described.devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"plan.topology = {name}: libtpu knows no such slice: {reason}") from error


def _cpu_devices(name: str, number: int) -> tuple[Any, ...]:
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UsageError(
            f"plan.topology = {name} needs {number} devices, but JAX started with {len(devices)}"
        )
    return tuple(devices[:number])


def seconds_to_send(topology: Topology, group: Group, sent: float) -> float:
    """Return how long a device takes to send bytes to the others of its group.

    On a torus it sends over all axes that the group extends over at once, as rings do: both ways
    round on an axis that closes to a ring, one way along a line. Cores of a chip share its links.

    Args:
        topology: Devices, in the order in which the group numbers them (the mesh's).
        group: Devices that exchange.
        sent: Bytes that each device sends.
    """
    chip = topology.chip
    if chip.kind != "tpu":
        return sent / chip.link_rate
    extents = _extents([topology.devices[number].coords for number in group])
    sizes = _extents([device.coords for device in topology.devices])
    links = sum(
        (extent > 1) + (extent == size and is_ring)
        for extent, size, is_ring in zip(extents, sizes, _closed_axes(chip, sizes), strict=True)
    )
    return sent / (chip.link_rate * (links or 2 * len(topology.sizes)))


def bytes_between_slices(topology: Topology, summed: float) -> float:
    """Return the bytes that a device sends in a ring to sum `summed` bytes over all slices."""
    return 2 * summed * (topology.slices - 1) / topology.slices


def _closed_axes(chip: Chip, sizes: list[int]) -> list[bool]:
    """Return which axes close to rings.  In: v5p, [2, 4, 4].  Out: none; for [4, 4, 8], all."""
    closed = [bool(chip.wraps) and size % chip.wraps == 0 for size in sizes]
    return [all(closed)] * len(sizes) if chip.cubes else closed


def _extents(places: list[tuple[int, ...]]) -> list[int]:
    """Return how many different coordinates there are along each axis."""
    return [len(set(coordinates)) for coordinates in zip(*places, strict=True)]
