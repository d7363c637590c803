"""What a device can do at best: one table of makers' figures."""

import dataclasses
from typing import Any, Literal

GIB, GB, GBIT = 2.0**30, 1e9, 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one device as JAX counts them: a chip, or one of its cores where `cores` is 2.

    Attributes:
        kind: Who can compile for it: libtpu, XLA's own CPU backend, nobody here.
        flops: Products of bfloat16 matrices, a second, dense.
        hbm: Bytes of memory that a program may use.
        hbm_rate: Of these, bytes read or written a second.
        link_rate: Bytes a second that one link to a neighbour carries one way; of GPUs, all links
            to the switch together.
        dcn_rate: Bytes a second that it sends to other slices; 0 where those are not planned.
        cores: Devices of a chip, which share its figures; those given are of one.
        wraps: Multiples at which an axis of a slice closes to a ring; 0 where none does.
        cubes: All axes of a slice close to rings or none, as cubes are joined.
        config: Of libtpu's configurations of the chip, the one that runs have; None its default.
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


# TPUs: peak, memory and its rate from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; links
# from jax-ml.github.io/scaling-book/tpus, by which a link of a v4 or v5e carries 45 GB/s one way,
# of a v5p or v6e 90; a tpu7x as a v5p, whose 1,200 GB/s a chip, both ways together, it has too.
# `hbm` is what libtpu 0.0.42 says a program may use, of nominal 32, 16, 95, 32 and 192 GiB a chip.
# Where optical switches join cubes of 4 x 4 x 4 (v4, v5p, tpu7x), only slices of whole cubes are
# tori; on a v5e or v6e an axis of 16 is a ring.
# The data-centre network's share of a chip is in the same pages as gigabits; of a v4 as of a v5p.
# Runs have both cores of a v4 as one device (megacore), and each of a tpu7x as one, half a chip.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, dense rates; NVLink one way.
# cpu: round figures for one core of a server, so that a plan of fake devices has something to say.
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
