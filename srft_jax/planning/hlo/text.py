"""XLA's text of a compiled program, read into computations and instructions.

%add.1 = f32[8,128]{1,0:T(8,128)S(1)} add(%x, %y), metadata={op_name="jit(f)/add"}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes of a number; of types that share a byte a part of it.
_BYTES = {
    **{"pred": 1.0, "s8": 1.0, "u8": 1.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25},
    **{"s16": 2.0, "u16": 2.0, "bf16": 2.0, "f16": 2.0, "s32": 4.0, "u32": 4.0, "f32": 4.0},
    **{"s64": 8.0, "u64": 8.0, "f64": 8.0, "c64": 8.0, "c128": 16.0, "token": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one array."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool  # or in a device's fast memory, S(1) and up

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        return self.count * (1.0 if self.dtype.startswith("f8") else _BYTES[self.dtype])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
        name: Without the %.
        shapes: Of the result; several of a tuple, nested ones in a row.
        opcode: E.g. fusion.
        operands: Their names.
        arguments: What stands between the opcode's parentheses.
        attributes: What stands behind them.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced function; empty where XLA does not say."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def channel(self) -> str:
        """Of a collective; empty where it has none, and of all else."""
        found = re.search(r"\bchannel_id=(\d+)", self.attributes)
        return found[1] if found else ""

    def named(self, attribute: str) -> str | None:
        """In: "body".  Out: the name of the computation in `body=%name`."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order, by name."""

    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction, those that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: Computation

    @functools.cached_property
    def begun(self) -> set[str]:
        """Channels of the collectives that a fusion begins and others go on with: async.py."""
        return {
            computation.instructions[computation.root.operands[0]].channel
            for computation in self.computations.values()
            if "AsyncCollectiveStart" in computation.root.attributes
        } - {""}


def parse(text: str) -> Module:
    """A program from what `Compiled.as_text()` gives."""
    found, entry = {}, None
    for header, lines in _blocks(text):
        pairs = [(line, _instruction(line.removeprefix("ROOT "))) for line in lines]
        by_name = {instruction.name: instruction for _, instruction in pairs}
        (root,) = (instruction for line, instruction in pairs if line.startswith("ROOT "))
        name = header.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
        found[name] = Computation(by_name, root)
        entry = found[name] if header.startswith("ENTRY ") else entry
    assert entry is not None  # every module has one
    return Module(found, entry)


_STARTS = re.compile(r"\s+(ROOT )?%[\w.\-]+ = ")


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Header and instructions of each computation; what a kernel says may take several lines."""
    header: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if header is None and line.endswith("{") and not line.startswith((" ", "HloModule")):
            header, lines = line, []
        elif header is not None and (line == "}" or line.startswith("}, execution_thread")):
            yield header, lines
            header = None
        elif header is not None and _STARTS.match(line):
            lines.append(line.strip())
        elif header is not None:
            lines[-1] += line


_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](\{[^}]*\})?")


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" = ")
    shape, rest = _split(rest)
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split("(" + rest)
    return Instruction(
        name=name.lstrip("%"),
        shapes=_shapes(shape),
        opcode=opcode.strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments[1:-1],
        attributes=attributes,
    )


def _split(text: str) -> tuple[str, str]:
    """The first word, or the first parenthesis with all in it, and what follows.

    In: "(f32[2]{0:T(128)}, s32[]) while(%t), body=%b".  Out: the tuple's shape, " while(%t), ...".
    """
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    raise ValueError(f"an open parenthesis in {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        whole = tuple(int(size.strip(" <=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(dtype, whole, space is None or space[1] == "0"))
    return tuple(found)
