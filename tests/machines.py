"""Devices that are not here, as their places in a machine."""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of one as its place in a machine takes."""

    id: int
    device_kind: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"


@dataclasses.dataclass(frozen=True)
class DeviceOfSlice(Device):
    slice_index: int = 0


def torus(kind, *sizes, cores=1):
    """All devices of a slice; the sizes are of x, y, z."""
    places = itertools.product(*map(range, reversed(sizes)), range(cores))
    return [
        Device(number, kind, (*reversed(place[:-1]), 0)[:3], place[-1])
        for number, place in enumerate(places)
    ]


def hosts(kind, *sizes):
    """A torus whose hosts have 2 x 2 chips each, in x and y."""

    def host(coords):
        return (coords[0] // 2, coords[1] // 2, coords[2])

    devices = torus(kind, *sizes)
    numbers = {one: n for n, one in enumerate(sorted({host(device.coords) for device in devices}))}
    return [dataclasses.replace(one, process_index=numbers[host(one.coords)]) for one in devices]


def slices(count, size, platform="gpu"):
    return [
        DeviceOfSlice(n, "H100", slice_index=n // size, platform=platform)
        for n in range(count * size)
    ]
