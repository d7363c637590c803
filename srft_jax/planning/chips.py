"""What a device can do at best: one table of manufacturers' figures."""

import dataclasses
from typing import Any, Literal

GIB, GB, GBIT = 2.0**30, 1e9, 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one device as JAX counts them: a chip, or one of its cores if `cores` is 2.

    Attributes:
        kind: Compiler: libtpu for a TPU, XLA's own for a CPU, none here for a GPU.
        flops: FLOPs per second of dense bfloat16 matmuls.
        hbm: Bytes of memory that a program may use.
        hbm_rate: Bytes per second read from that memory or written to it.
        link_rate: Bytes per second that one link to a neighbour carries one way; for a GPU, all its
            links to the switch together.
        dcn_rate: Bytes per second sent to other slices; 0 if several are not planned.
        cores: Devices per chip, which share its figures; the figures here are those of one.
        wraps: An axis of a slice closes to a ring at multiples of this; 0 if none does.
        cubes: All axes of a slice close to rings or none does, as cubes are joined.
        config: The chip's configuration in libtpu that runs have; None is libtpu's default.
    """

    kind: Literal["tpu", "cpu", "gpu"]
    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float
    dcn_rate: float = 0.0
    cores: int = 1
    wraps: int = 0
    cubes: bool = False
    config: str | None = None


# TPUs: peak, memory and its rate are from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
# Link rates are from jax-ml.github.io/scaling-book/tpus: 45 GB/s one way for v4 and v5e, 90 for v5p
# and v6e. A tpu7x has a v5p's 1,200 GB/s a chip, both ways together, so it counts as a v5p.
# `hbm` is what libtpu 0.0.42 lets a program use, of nominal 32, 16, 95, 32 and 192 GiB a chip.
# v4, v5p and tpu7x join cubes of 4 x 4 x 4 by optical switches: only whole cubes make a torus. On a
# v5e or v6e an axis of 16 is a ring.
# `dcn_rate` is a chip's share in the same pages, in gigabits; a v4 counts as a v5p.
# Runs have both cores of a v4 as one device (megacore), each core of a tpu7x as one, half a chip.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, dense rates; NVLink one way.
# cpu: round figures for one core of a server, so that a plan of fake devices can be made.
_CUBES: dict[str, Any] = {"wraps": 4, "cubes": True}
CHIPS = {
    "v4": Chip(
        kind="tpu",
        flops=275e12,
        hbm=30.75 * GIB,
        hbm_rate=1200 * GB,
        link_rate=45 * GB,
        dcn_rate=50 * GBIT,
        config="megacore",
        **_CUBES,
    ),
    "v5e": Chip(
        kind="tpu",
        flops=197e12,
        hbm=15.75 * GIB,
        hbm_rate=819 * GB,
        link_rate=45 * GB,
        dcn_rate=25 * GBIT,
        wraps=16,
    ),
    "v5p": Chip(
        kind="tpu",
        flops=459e12,
        hbm=95.74 * GIB,
        hbm_rate=2765 * GB,
        link_rate=90 * GB,
        dcn_rate=50 * GBIT,
        **_CUBES,
    ),
    "v6e": Chip(
        kind="tpu",
        flops=918e12,
        hbm=31.25 * GIB,
        hbm_rate=1640 * GB,
        link_rate=90 * GB,
        dcn_rate=100 * GBIT,
        wraps=16,
    ),
    "tpu7x": Chip(
        kind="tpu",
        flops=2307e12 / 2,
        hbm=94.75 * GIB,
        hbm_rate=7380 * GB / 2,
        link_rate=90 * GB / 2,
        dcn_rate=100 * GBIT / 2,
        cores=2,
        **_CUBES,
    ),
    "a100": Chip(kind="gpu", flops=312e12, hbm=80 * GB, hbm_rate=2039 * GB, link_rate=300 * GB),
    "h100": Chip(kind="gpu", flops=989e12, hbm=80 * GB, hbm_rate=3350 * GB, link_rate=450 * GB),
    "h200": Chip(kind="gpu", flops=989e12, hbm=141 * GB, hbm_rate=4800 * GB, link_rate=450 * GB),
    "cpu": Chip(kind="cpu", flops=0.1e12, hbm=4 * GIB, hbm_rate=10 * GB, link_rate=10 * GB),
}
