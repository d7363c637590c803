"""Devices that need not be there, and the rate at which groups of them exchange."""

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
        name: As asked for.
        chip: Of each device.
        sizes: Of a slice along its axes, in chips.
        devices: For a mesh; of GPUs, which nothing here compiles for, fake ones on the CPU.
        slices: How many, joined by the data-centre network.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: tuple[Any, ...]
    slices: int = 1

    def ordered(self, mesh: Mesh) -> "Topology":
        """With the devices in the mesh's order."""
        return dataclasses.replace(self, devices=tuple(mesh.devices.flat))


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """In: "v5p:4x4x4".  Out: "v5p", (4, 4, 4).

    Raises:
        UsageError: another form, or a chip that is not in the table.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in CHIPS:
        raise UsageError(
            f"plan.topology = {name} is not of the form v5p:4x4x4, cpu:8 or h100:8, with one of "
            f"{', '.join(CHIPS)}"
        )
    return found[1], tuple(map(int, found[2].split("x")))


# What libtpu otherwise looks for on the machine, in vain and with complaints where there is no TPU;
# and that a second process may load it, as nothing here touches a chip.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_HOST_BOUNDS": "1,1,1",
}


def prepare_backend(name: str) -> None:
    """Before JAX is used: on the CPU, with as many fake devices as will be asked for.

    Without the cache of compiled programs: what is compiled for a topology cannot be read back.
    Libtpu is told that there is no TPU, where the environment does not say otherwise.

    Raises:
        UsageError: as `split_name`.
    """
    chip, sizes = split_name(name)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if CHIPS[chip].kind == "tpu":
        for variable, value in _LIBTPU.items():
            os.environ.setdefault(variable, value)
    else:
        jax.config.update("jax_num_cpu_devices", math.prod(sizes))


def topology_of(name: str, slices: int = 1) -> Topology:
    """The devices of so many slices; `prepare_backend` comes before.

    Raises:
        UsageError: there is no such slice, or nothing to compile for it with.
    """
    kind, sizes = split_name(name)
    chip = CHIPS[kind]
    if chip.kind == "tpu":
        return Topology(name, chip, sizes, _tpus(name, chip, slices), slices)
    if slices != 1:
        raise UsageError(f"mesh.slices = {slices}: only of TPUs several are planned, not of {name}")
    return Topology(name, chip, sizes, _cpus(name, math.prod(sizes)))


def _tpus(name: str, chip: Chip, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"plan.topology = {name} is compiled by libtpu, which runs on any machine but is not "
            "installed: pip install 'srft_jax[tpu]'"
        )
    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    if slices > 1:  # else devices say nothing of slices
        options["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return tuple(found.devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"plan.topology = {name}: libtpu knows no such slice: {said}") from error


def _cpus(name: str, number: int) -> tuple[Any, ...]:
    found = jax.devices("cpu")
    if len(found) < number:
        raise UsageError(
            f"plan.topology = {name} needs {number} devices, but JAX has started with {len(found)}"
        )
    return tuple(found[:number])


def seconds_to_send(topology: Topology, group: Group, sent: float) -> float:
    """How long a device takes to send so many bytes to the others of its group.

    On a torus as rings do it, over all axes that the group extends over at once: both ways round
    where an axis closes to a ring, one way along a line. The cores of one chip have all its links.

    Args:
        topology: Its devices in the order in which the group numbers them, as a mesh has them.
        group: Who exchanges.
        sent: By each.
    """
    chip = topology.chip
    if chip.kind != "tpu":
        return sent / chip.link_rate
    extents = _extents([topology.devices[number].coords for number in group])
    sizes = _extents([device.coords for device in topology.devices])
    links = sum(
        (extent > 1) + (extent == size and is_ring)
        for extent, size, is_ring in zip(extents, sizes, _rings(chip, sizes), strict=True)
    )
    return sent / (chip.link_rate * (links or 2 * len(topology.sizes)))


def between_slices(topology: Topology, summed: float) -> float:
    """Bytes that a device sends to sum so many with its like in every other slice, as rings do."""
    return 2 * summed * (topology.slices - 1) / topology.slices


def _rings(chip: Chip, sizes: list[int]) -> list[bool]:
    """Which axes of a slice close.  In: v5p, [2, 4, 4].  Out: none; of a v5p's [4, 4, 8], all."""
    found = [bool(chip.wraps) and size % chip.wraps == 0 for size in sizes]
    return [all(found)] * len(sizes) if chip.cubes else found


def _extents(places: list[tuple[int, ...]]) -> list[int]:
    """How many places there are along each axis."""
    return [len(set(of_axis)) for of_axis in zip(*places, strict=True)]
