"""How often a loop of a compiled program runs, if the program fixes it."""

import math
import re
from collections.abc import Iterable

from srft_jax.planning.hlo.parser import Computation, Instruction, Module


def fixed_trip_count(loop: Instruction, module: Module) -> float | None:
    """Return how often a loop runs whose counter starts at 0 and has a constant bound; else None.

    XLA doubles the body of some loops; their counter then rises by 2.
    In: while (i < 8) { ...; i += 2 }.  Out: 4.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return float(match[1])
    condition, body = module.called_by(loop, "condition"), module.called_by(loop, "body")
    compared = _bound_and_counter(condition)
    if compared is None:
        return None
    bound, index = compared
    root = body.root
    step = _rise(body, root.operands[index], index, module) if root.opcode == "tuple" else 1
    return float(math.ceil(bound / max(step or 1, 1)))


def _bound_and_counter(condition: Computation) -> tuple[int, int] | None:
    """Return the constant, and which element of the loop's tuple is compared with it."""
    root = condition.root
    if root.opcode not in ("compare", "fusion") or len(root.operands) != 2:
        return None
    if root.opcode == "compare" and "direction=LT" not in root.attributes:
        return None
    sides = [condition.instructions[name] for name in root.operands]
    constants = [side for side in sides if side.opcode == "constant"]
    counters = [side for side in sides if side.opcode == "get-tuple-element"]
    if len(constants) != 1 or len(counters) != 1:
        return None
    return int(constants[0].arguments), _tuple_index(counters[0])


def _tuple_index(element: Instruction) -> int:
    return int(element.attributes.partition("index=")[2].partition(",")[0])


def _rise(body: Computation, name: str, index: int, module: Module) -> int | None:
    """Return by how much `name` exceeds element `index` of the body's argument; None if unknown.

    In: %next = add(%i, 1), %last = add(%next, 1), and %i is element 0.  Out, for %last, 0: 2.
    """
    value = body.instructions[name]
    if value.opcode == "get-tuple-element":
        return 0 if _tuple_index(value) == index else None
    if value.opcode in ("copy", "bitcast"):
        return _rise(body, value.operands[0], index, module)
    if value.opcode == "fusion":
        return _rise_in_fusion(body, value, index, module)
    if value.opcode != "add":
        return None
    return _sum_if_known(
        int(operand.arguments)
        if operand.opcode == "constant"
        else _rise(body, operand.name, index, module)
        for operand in (body.instructions[name] for name in value.operands)
    )


def _rise_in_fusion(
    body: Computation, fusion: Instruction, index: int, module: Module
) -> int | None:
    """Return the rise by an addition within a fusion, of the counter and constants."""
    inside = module.called_by(fusion)
    if inside.root.opcode != "add":
        return None

    def operand_rise(name: str) -> int | None:
        value = inside.instructions[name]
        if value.opcode == "parameter":
            outside = body.instructions[fusion.operands[int(value.arguments)]]
            if outside.opcode != "constant":
                return _rise(body, outside.name, index, module)
            value = outside
        return int(value.arguments) if value.opcode == "constant" else None

    return _sum_if_known(operand_rise(name) for name in inside.root.operands)


def _sum_if_known(parts: Iterable[int | None]) -> int | None:
    """Return the sum, or None from the first part on that is None."""
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
