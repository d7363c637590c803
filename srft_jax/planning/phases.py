"""The phases of a step, each one or more compiled programs, and the roofline time of each.

A phase takes at least as long as the slowest of its matmuls, its memory traffic and its exchange,
each at the device's peak rate: then all three overlap perfectly. It takes at most their sum.
"""

import dataclasses

from srft_jax.planning.hlo.count import Count
from srft_jax.planning.topology import Topology, bytes_between_slices, seconds_to_send


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of one step on one device.

    Attributes:
        name: "train", or a program of the sampler: conversion, prefill, decode.
        count: Sum over its programs of count x runs per step.
        compute: Seconds of matmuls at peak.
        memory: Seconds of HBM traffic at peak.
        exchange: Seconds to send within a slice and then between slices.
        to_slices: Bytes sent to other slices.
    """

    name: str
    count: Count
    compute: float
    memory: float
    exchange: float
    to_slices: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds if matmuls, memory traffic and exchange overlap."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def most_seconds(self) -> float:
        """Seconds if nothing overlaps."""
        return self.compute + self.memory + self.exchange

    @property
    def bound(self) -> str:
        """Which of "compute", "HBM" and "links" takes the longest."""
        times = {"compute": self.compute, "HBM": self.memory, "links": self.exchange}
        return max(times, key=lambda name: times[name])


def make_phase(name: str, count: Count, topology: Topology) -> Phase:
    """Return the phase whose programs do the work `count` in a step."""
    chip, to_slices = topology.chip, bytes_between_slices(topology, count.summed)
    within = sum(
        seconds_to_send(topology, group, sent) for (_, group), sent in count.collectives.items()
    )
    return Phase(
        name,
        count,
        compute=count.flops / chip.flops,
        memory=count.hbm_bytes / chip.hbm_rate,
        exchange=within + (to_slices / chip.dcn_rate if to_slices else 0.0),
        to_slices=to_slices,
    )
