"""libtpu's asynchronous collectives: begun by one fusion, advanced by others as they compute.

The fusion that begins one ends in a custom call `AsyncCollectiveStart` of it, the last in an
`AsyncCollectiveDone`; all of them, and those between, name the same collective with its channel:

    %start = all-gather(%shard), channel_id=23   then AsyncCollectiveStart(%start)
    %step = all-gather(%shard), channel_id=23    beside a product of matrices, any number of times
    %done = all-gather(%shard), channel_id=23    then AsyncCollectiveDone(..., %done, ...)
"""

import re

from srft_jax.tasks.planning.hlo_text import Computation, Instruction, Module


def goes_on(collective: Instruction, computation: Computation, module: Module) -> bool:
    """Whether it is one that another fusion has begun, and so costs nothing here."""
    channel = _channel(collective)
    if not channel or any(_is(user, "Start") for user in computation.users[collective.name]):
        return False
    return channel in {
        _channel(other.instructions[other.root.operands[0]])
        for other in module.computations.values()
        if _is(other.root, "Start")
    }


def advances(computation: Computation, module: Module) -> bool:
    """Of a fusion beside whose work some collective goes on, whose buffers it hands on."""
    return any(goes_on(one, computation, module) for one in computation.instructions.values())


def is_end(computation: Computation) -> bool:
    """Of a fusion that waits for what others have sent."""
    return _is(computation.root, "Done")


def _is(call: Instruction, what: str) -> bool:
    return call.opcode == "custom-call" and f'"AsyncCollective{what}"' in call.attributes


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else ""
