"""libtpu's asynchronous collectives: begun by one fusion, advanced by others as they compute.

The fusion that begins one ends in a custom call `AsyncCollectiveStart` of it, the last in an
`AsyncCollectiveDone`; all of them, and those between, name the same collective with its channel:

    %start = all-gather(%shard), channel_id=23   then AsyncCollectiveStart(%start)
    %step = all-gather(%shard), channel_id=23    beside a product of matrices, any number of times
    %done = all-gather(%shard), channel_id=23    then AsyncCollectiveDone(..., %done, ...)
"""

from srft_jax.planning.hlo.text import Computation, Instruction, Module


def goes_on(collective: Instruction, computation: Computation, module: Module) -> bool:
    """Whether it is one that another fusion has begun, and so costs nothing here."""
    begins = "AsyncCollectiveStart" in computation.root.attributes
    return not begins and collective.channel in module.begun


def advances(computation: Computation, module: Module) -> bool:
    """Of a fusion beside whose work some collective goes on, whose buffers it hands on."""
    return any(goes_on(one, computation, module) for one in computation.instructions.values())


def is_end(computation: Computation) -> bool:
    """Of a fusion that waits for what others have sent."""
    return "AsyncCollectiveDone" in computation.root.attributes
