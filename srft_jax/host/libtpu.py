"""What libtpu is told before it compiles anything: gathers of parameters overlap with products.

By itself libtpu does that on a v5e, but on v5p and v6e it may take a product apart and send its
operand around in pieces, after each of which all of the result is read and written again: a train
step of 7B on `v6e:4x8` then moved 4 times as much in HBM. docs/scaling.md has figures.
"""

import os

_FLAGS = (
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",  # no product is as large
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)


def set_flags() -> None:
    """Before jax is imported; where `LIBTPU_INIT_ARGS` is set, even to nothing, it stays.

    On a machine with TPUs jax adds a flag of its own to the variable, at its import.
    """
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(_FLAGS))
