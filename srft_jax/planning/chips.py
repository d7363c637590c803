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
        *("tpu", 275e12, 30.75 * GIB, 1200 * GB, 45 * GB, 50 * GBIT), **_CUBES, config="megacore"
    ),
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 819 * GB, 45 * GB, 25 * GBIT, wraps=16),
    "v5p": Chip("tpu", 459e12, 95.74 * GIB, 2765 * GB, 90 * GB, 50 * GBIT, **_CUBES),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1640 * GB, 90 * GB, 100 * GBIT, wraps=16),
    "tpu7x": Chip(
        *("tpu", 2307e12 / 2, 94.75 * GIB, 7380 * GB / 2, 90 * GB / 2, 100 * GBIT / 2),
        **_CUBES,
        cores=2,
    ),
    "a100": Chip("gpu", 312e12, 80 * GB, 2039 * GB, 300 * GB),
    "h100": Chip("gpu", 989e12, 80 * GB, 3350 * GB, 450 * GB),
    "h200": Chip("gpu", 989e12, 141 * GB, 4800 * GB, 450 * GB),
    "cpu": Chip("cpu", 0.1e12, 4 * GIB, 10 * GB, 10 * GB),
}
