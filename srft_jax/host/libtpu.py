"""Flags that libtpu needs before it compiles anything: gathers of parameters overlap with products.

On a v5e libtpu does that by itself. On v5p and v6e it may instead take a product apart and send its
operand around in pieces; after each piece all of the result is read and written again. A train step
of 7B on `v6e:4x8` then moved 4 times as much in HBM. docs/scaling.md has figures.
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
    """Set `LIBTPU_INIT_ARGS`, unless the user has set it, even to nothing.

    It must happen before jax is imported: on a machine with TPUs jax then adds a flag of its own to
    the variable, or sets the variable to that flag alone.
    """
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(_FLAGS))
