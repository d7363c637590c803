"""How often a loop of a compiled program runs, where the program says so."""

import math
from collections.abc import Iterable

from srft_jax.planning.hlo.text import Computation, Instruction, Module


def fixed_trips(loop: Instruction, module: Module) -> float | None:
    """Of a loop that goes on while its number, from 0, is below a constant; None of others.

    XLA doubles the body of some loops, whose number then rises by 2.
    In: while (i < 8) { ...; i += 2 }.  Out: 4.
    """
    condition, body = (module.computations[loop.named(of) or ""] for of in ("condition", "body"))
    found = _bound(condition)
    if found is None:
        return None
    bound, index = found
    root = body.root
    step = _rise(body, root.operands[index], index, module) if root.opcode == "tuple" else 1
    return float(math.ceil(bound / max(step or 1, 1)))


def _bound(condition: Computation) -> tuple[int, int] | None:
    """The constant, and which element of the loop's tuple is compared with it."""
    root = condition.root
    if root.opcode not in ("compare", "fusion") or len(root.operands) != 2:
        return None
    if root.opcode == "compare" and "direction=LT" not in root.attributes:
        return None
    sides = [condition.instructions[name] for name in root.operands]
    constants = [one for one in sides if one.opcode == "constant"]
    numbers = [one for one in sides if one.opcode == "get-tuple-element"]
    if len(constants) != 1 or len(numbers) != 1:
        return None
    return int(constants[0].arguments), _index(numbers[0])


def _index(element: Instruction) -> int:
    return int(element.attributes.partition("index=")[2].partition(",")[0])


def _rise(body: Computation, name: str, index: int, module: Module) -> int | None:
    """By how much an integer exceeds element `index` of the body's argument; None if unknown."""
    one = body.instructions[name]
    if one.opcode == "get-tuple-element":
        return 0 if _index(one) == index else None
    if one.opcode in ("copy", "bitcast"):
        return _rise(body, one.operands[0], index, module)
    if one.opcode == "fusion":
        return _rise_of_fusion(body, one, index, module)
    if one.opcode != "add":
        return None
    return _sum(
        int(operand.arguments)
        if operand.opcode == "constant"
        else _rise(body, operand.name, index, module)
        for operand in (body.instructions[name] for name in one.operands)
    )


def _rise_of_fusion(
    body: Computation, fusion: Instruction, index: int, module: Module
) -> int | None:
    """Of an addition within a fusion, whose operands are constants and the number."""
    inside = module.computations[fusion.named("calls") or ""]
    if inside.root.opcode != "add":
        return None

    def of(name: str) -> int | None:
        one = inside.instructions[name]
        if one.opcode == "parameter":
            outside = body.instructions[fusion.operands[int(one.arguments)]]
            if outside.opcode != "constant":
                return _rise(body, outside.name, index, module)
            one = outside
        return int(one.arguments) if one.opcode == "constant" else None

    return _sum(of(name) for name in inside.root.operands)


def _sum(parts: Iterable[int | None]) -> int | None:
    """None where a part is."""
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
