"""Bytes that an instruction reads and writes in a device's memory (HBM).

Operands are read and results written, once each, but:

    a slice reads what it gives; an update in place reads and writes the part that it changes
    a fusion does so too where all it does with an operand, or with a result, is that
    what lies in fast memory costs nothing, and neither does what only renames
"""

from srft_jax.planning.hlo.async_pairs import advances, goes_on, is_end
from srft_jax.planning.hlo.text import Computation, Instruction, Module, Shape

_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "while", "conditional", "call", "domain", "opt-barrier"),
    *("add-dependency", "async-update"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written
_RENAMES = {"bitcast", "reshape", "get-tuple-element"}


def bytes_of(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Read and written, in HBM."""
    kind = instruction.opcode
    if (
        kind in _FREE
        or kind.endswith("-done")
        or (kind == "custom-call" and _is_nothing(instruction))
    ):
        return 0.0
    operands = [computation.instructions[name] for name in instruction.operands]
    if kind == "fusion":
        return _of_fusion(instruction, operands, module)
    if kind in _SLICES:
        return _in_hbm(instruction.shapes) * (1 + operands[0].shapes[0].in_hbm)
    if kind == "slice-start":  # ((operand), slice, context): prefetched in parts
        part = instruction.shapes[1]
        return part.bytes * (operands[0].shapes[0].in_hbm + part.in_hbm)
    if kind in _UPDATES:
        return 2 * _in_hbm(operands[_UPDATES[kind]].shapes)
    results = instruction.shapes[:1] if kind == "copy-start" else instruction.shapes
    if kind.endswith("-start") and kind != "copy-start":
        return _in_hbm(results)  # a tuple of operands and results
    return sum(_in_hbm(operand.shapes) for operand in operands) + _in_hbm(results)


def _is_nothing(call: Instruction) -> bool:
    """A custom call that only reserves or annotates."""
    return not call.operands or "AssumeGatherIndicesInBound" in call.attributes


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _of_fusion(fusion: Instruction, operands: list[Instruction], module: Module) -> float:
    called = module.computations[fusion.named("calls") or ""]
    if is_end(called):
        return 0.0
    parameters = _parameters(called)
    read = sum(
        _read(called, parameters[number], module)
        for number, operand in enumerate(operands)
        if operand.shapes and operand.shapes[0].in_hbm
    )
    results = _results(called, called.root)
    if len(results) != len(fusion.shapes):
        return read + _in_hbm(fusion.shapes)
    # Beside the work of a fusion a collective may go on, whose buffers it hands to the next.
    hands_on = advances(called, module)
    return read + sum(
        _written(called, one, module)
        for one, shape in zip(results, fusion.shapes, strict=True)
        if shape.in_hbm
        and not (hands_on and (one.opcode == "parameter" or goes_on(one, called, module)))
    )


def _parameters(called: Computation) -> dict[int, Instruction]:
    inside = called.instructions.values()
    return {int(one.arguments): one for one in inside if one.opcode == "parameter"}


def _results(called: Computation, root: Instruction) -> list[Instruction]:
    if root.opcode != "tuple":
        return [root]
    return [called.instructions[name] for name in root.operands]


def _read(called: Computation, value: Instruction, module: Module) -> float:
    """Of a value inside a fusion, what its users need; never more than all of it."""
    whole, needed = sum(shape.bytes for shape in value.shapes), 0.0
    for user in called.users[value.name]:
        is_first = user.operands[0] == value.name
        if user.opcode in _SLICES and is_first:
            needed += user.shapes[0].bytes
        elif user.opcode in _UPDATES and is_first:
            needed += 0.0  # what it does not change stays where it is
        elif goes_on(user, called, module) or _hands_on(user, called, module):
            needed += 0.0
        elif _renames(user, module):
            needed += _read(called, user, module)
        elif user.opcode == "fusion":
            inner = module.computations[user.named("calls") or ""]
            number = user.operands.index(value.name)
            needed += _read(inner, _parameters(inner)[number], module)
        else:
            return whole
    return min(whole, needed)


def _written(called: Computation, value: Instruction, module: Module) -> float:
    """Of a result of a fusion: all of it, or the part that is updated."""
    if value.opcode in _UPDATES:
        updated = called.instructions[value.operands[_UPDATES[value.opcode]]]
        return updated.shapes[0].bytes
    if value.opcode in _RENAMES and len(value.operands) == 1:
        return _written(called, called.instructions[value.operands[0]], module)
    if value.opcode == "fusion" and len(value.shapes) == 1:
        inner = module.computations[value.named("calls") or ""]
        return _written(inner, inner.root, module)
    return sum(shape.bytes for shape in value.shapes)


def _hands_on(user: Instruction, called: Computation, module: Module) -> bool:
    """Whether it is where a fusion hands a collective's buffers to the next."""
    is_last = user is called.root and user.opcode == "tuple"
    return is_last and advances(called, module)


def _renames(user: Instruction, module: Module) -> bool:
    """And does nothing else; a fusion within a fusion may be such a one."""
    if user.opcode != "fusion":
        return user.opcode in _RENAMES
    called = module.computations[user.named("calls") or ""]
    value = called.root
    while value.opcode in _RENAMES:
        value = called.instructions[value.operands[0]]
    return value.opcode == "parameter"
