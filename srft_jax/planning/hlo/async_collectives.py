"""libtpu's asynchronous collectives: one fusion starts them, others carry them on as they compute.

Each of these fusions repeats the collective, channel included, beside its own work:

    %start = all-gather(%shard), channel_id=23   the root is AsyncCollectiveStart(%start)
    %step = all-gather(%shard), channel_id=23    beside a matmul, in any number of fusions
    %done = all-gather(%shard), channel_id=23    the root is AsyncCollectiveDone(..., %done, ...)
"""

from srft_jax.planning.hlo.parser import Computation, Instruction, Module


def started_elsewhere(collective: Instruction, computation: Computation, module: Module) -> bool:
    """Return whether another fusion starts this collective, so that it costs nothing here."""
    starts_here = "AsyncCollectiveStart" in computation.root.attributes
    return not starts_here and collective.channel in module.started_channels


def carries_collective(computation: Computation, module: Module) -> bool:
    """Return whether a fusion only continues some collective and passes its buffers on."""
    return any(
        started_elsewhere(instruction, computation, module)
        for instruction in computation.instructions.values()
    )


def awaits_collective(computation: Computation) -> bool:
    """Return whether a fusion ends a collective: it waits for what other devices have sent."""
    return "AsyncCollectiveDone" in computation.root.attributes
