"""The phases of a step, each one or more compiled programs, and the roofline time of each.

A phase takes as long as the slowest of its products of matrices, its memory traffic and what it
exchanges, each at the device's peak rate: all three overlap perfectly. Their sum, without any
overlap, is the other end.
"""

import dataclasses

from srft_jax.planning.hlo.count import Count
from srft_jax.planning.topology import Topology, between_slices, seconds_to_send


@dataclasses.dataclass(frozen=True)
class Phase:
    """Of one step, on one device.

    Attributes:
        name: rollout's conversion, prefill and decode; train.
        count: Of all its programs, as often as a step runs them.
        compute: Seconds at peak.
        memory: Likewise.
        exchange: Likewise, within a slice and between slices one after the other.
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
        return max(self.compute, self.memory, self.exchange)

    @property
    def most_seconds(self) -> float:
        return self.compute + self.memory + self.exchange

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "HBM": self.memory, "links": self.exchange}
        return max(times, key=lambda name: times[name])


def phase(name: str, count: Count, topology: Topology) -> Phase:
    """Of what the programs of a phase do in a step."""
    chip, to_slices = topology.chip, between_slices(topology, count.summed)
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
