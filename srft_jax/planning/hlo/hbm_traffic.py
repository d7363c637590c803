"""Bytes that one instruction reads and writes in a device's main memory (HBM).

Every operand is read once and every result written once, except that

    a slice reads only the part it returns; an update in place reads and writes the part it changes
    the same holds for a fusion which does nothing else with an operand, or with a result
    arrays in fast memory cost nothing, and neither do instructions that only rename
"""

from srft_jax.planning.hlo.async_collectives import (
    awaits_collective,
    carries_collective,
    started_elsewhere,
)
from srft_jax.planning.hlo.parser import Computation, Instruction, Module, Shape

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "while", "conditional", "call", "domain", "opt-barrier"),
    *("add-dependency", "async-update"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> operand that is written
_RENAMES = {"bitcast", "reshape", "get-tuple-element"}


def hbm_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Return the bytes that `instruction` of `computation` reads and writes in HBM."""
    opcode = instruction.opcode
    if (
        opcode in _FREE
        or opcode.endswith("-done")  # its -start has been counted
        or (opcode == "custom-call" and _only_annotates(instruction))
    ):
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "fusion":
        return _fusion_bytes(instruction, operands, module)
    if opcode in _SLICES:
        return _bytes_in_hbm(instruction.shapes) * (1 + operands[0].shapes[0].in_hbm)
    if opcode == "slice-start":  # results ((operand), slice, context): the slice is prefetched
        part = instruction.shapes[1]
        return part.bytes * (operands[0].shapes[0].in_hbm + part.in_hbm)
    if opcode in _UPDATES:
        return 2 * _bytes_in_hbm(operands[_UPDATES[opcode]].shapes)
    if opcode.endswith("-start") and opcode != "copy-start":
        return _bytes_in_hbm(instruction.shapes)  # the tuple holds the operands and the results
    results = instruction.shapes[:1] if opcode == "copy-start" else instruction.shapes
    return sum(_bytes_in_hbm(operand.shapes) for operand in operands) + _bytes_in_hbm(results)


def _only_annotates(custom_call: Instruction) -> bool:
    """Return whether a custom call reserves memory or states a fact, and touches nothing."""
    return not custom_call.operands or "AssumeGatherIndicesInBound" in custom_call.attributes


def _bytes_in_hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _fusion_bytes(fusion: Instruction, operands: list[Instruction], module: Module) -> float:
    called = module.called_by(fusion)
    if awaits_collective(called):
        return 0.0
    parameters = _parameters(called)
    read = sum(
        _bytes_read(called, parameters[number], module)
        for number, operand in enumerate(operands)
        if operand.shapes and operand.shapes[0].in_hbm
    )
    results = _results(called, called.root)
    if len(results) != len(fusion.shapes):  # a root whose one value is a tuple
        return read + _bytes_in_hbm(fusion.shapes)
    carries = carries_collective(called, module)
    return read + sum(
        _bytes_written(called, result, module)
        for result, shape in zip(results, fusion.shapes, strict=True)
        if shape.in_hbm
        # Buffers of a collective that goes on beside the work stay where they are.
        and not (
            carries and (result.opcode == "parameter" or started_elsewhere(result, called, module))
        )
    )


def _parameters(called: Computation) -> dict[int, Instruction]:
    """Return the parameters of a computation by their number."""
    return {
        int(instruction.arguments): instruction
        for instruction in called.instructions.values()
        if instruction.opcode == "parameter"
    }


def _results(called: Computation, root: Instruction) -> list[Instruction]:
    if root.opcode != "tuple":
        return [root]
    return [called.instructions[name] for name in root.operands]


def _bytes_read(called: Computation, value: Instruction, module: Module) -> float:
    """Return the bytes of `value`, inside a fusion, that its users need; at most all of them."""
    whole, needed = sum(shape.bytes for shape in value.shapes), 0.0
    for user in called.users[value.name]:
        is_first = user.operands[0] == value.name
        if user.opcode in _SLICES and is_first:
            needed += user.shapes[0].bytes
        elif user.opcode in _UPDATES and is_first:
            needed += 0.0  # what an update does not change stays where it is
        elif started_elsewhere(user, called, module) or _passes_on(user, called, module):
            needed += 0.0  # counted in the fusion that starts the collective
        elif _only_renames(user, module):
            needed += _bytes_read(called, user, module)
        elif user.opcode == "fusion":
            inner = module.called_by(user)
            parameter = _parameters(inner)[user.operands.index(value.name)]
            needed += _bytes_read(inner, parameter, module)
        else:
            return whole
    return min(whole, needed)


def _bytes_written(called: Computation, value: Instruction, module: Module) -> float:
    """Return the bytes of `value`, a result of a fusion, that are written: all, or an update."""
    if value.opcode in _UPDATES:
        update = called.instructions[value.operands[_UPDATES[value.opcode]]]
        return update.shapes[0].bytes
    if value.opcode in _RENAMES and len(value.operands) == 1:
        return _bytes_written(called, called.instructions[value.operands[0]], module)
    if value.opcode == "fusion" and len(value.shapes) == 1:
        inner = module.called_by(value)
        return _bytes_written(inner, inner.root, module)
    return sum(shape.bytes for shape in value.shapes)


def _passes_on(user: Instruction, called: Computation, module: Module) -> bool:
    """Return whether `user` is the tuple that passes a collective's buffers to the next fusion."""
    is_last = user is called.root and user.opcode == "tuple"
    return is_last and carries_collective(called, module)


def _only_renames(user: Instruction, module: Module) -> bool:
    """Return whether `user`, maybe a fusion within a fusion, does nothing but rename."""
    if user.opcode != "fusion":
        return user.opcode in _RENAMES
    called = module.called_by(user)
    value = called.root
    while value.opcode in _RENAMES:
        value = called.instructions[value.operands[0]]
    return value.opcode == "parameter"
