"""A compiled program's text, read into computations and instructions.

A line is an instruction; here its result lies in fast memory, S(1):

    %add.1 = f32[8,128]{1,0:T(8,128)S(1)} add(%x, %y), metadata={op_name="jit(f)/add"}
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes of a number; a fraction for types of which several share a byte.
_BYTES = {
    **{"pred": 1.0, "s8": 1.0, "u8": 1.0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25},
    **{"s16": 2.0, "u16": 2.0, "bf16": 2.0, "f16": 2.0, "s32": 4.0, "u32": 4.0, "f32": 4.0},
    **{"s64": 8.0, "u64": 8.0, "f64": 8.0, "c64": 8.0, "c128": 16.0, "token": 0.0},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Type, sizes and place of one array."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool  # False in fast memory, S(1) and up

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        return self.count * (1.0 if self.dtype.startswith("f8") else _BYTES[self.dtype])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Name of the result, without the %.
        shapes: Shapes of the result; several for a tuple, a nested one's flattened.
        opcode: Operation, e.g. fusion.
        operands: Names of the instructions that it reads.
        arguments: Text between the opcode's parentheses.
        attributes: Text behind the parentheses.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def op_name(self) -> str:
        """Its place in the traced function; empty if XLA does not say."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def channel(self) -> str:
        """Channel of a collective; empty if it has none."""
        match = re.search(r"\bchannel_id=(\d+)", self.attributes)
        return match[1] if match else ""

    def computation_name(self, attribute: str) -> str | None:
        """In: "body".  Out: "name", for an instruction with `body=%name`."""
        match = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run."""

    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction's result."""
        readers: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                readers[operand].append(instruction)
        return readers


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation

    def called_by(self, instruction: Instruction, attribute: str = "calls") -> Computation:
        """Return the computation that an attribute of `instruction` names."""
        return self.computations[instruction.computation_name(attribute) or ""]

    @functools.cached_property
    def started_channels(self) -> set[str]:
        """Channels of collectives that one fusion starts and others carry on."""
        return {
            computation.instructions[computation.root.operands[0]].channel
            for computation in self.computations.values()
            if "AsyncCollectiveStart" in computation.root.attributes
        } - {""}


def parse_hlo(text: str) -> Module:
    """Parse what `Compiled.as_text()` returns."""
    computations, entry = {}, None
    for header, lines in _split_computations(text):
        pairs = [(line, _instruction(line.removeprefix("ROOT "))) for line in lines]
        by_name = {instruction.name: instruction for _, instruction in pairs}
        (root,) = (instruction for line, instruction in pairs if line.startswith("ROOT "))
        name = header.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
        computations[name] = Computation(by_name, root)
        entry = computations[name] if header.startswith("ENTRY ") else entry
    assert entry is not None  # every module has one
    return Module(computations, entry)


_STARTS = re.compile(r"\s+(ROOT )?%[\w.\-]+ = ")


def _split_computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each computation's header and instructions; a kernel's may take several lines."""
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
            lines[-1] += line  # the instruction above goes on


_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](\{[^}]*\})?")


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" = ")
    shape, rest = _split_word(rest)
    opcode, _, rest = rest.partition("(")
    arguments, attributes = _split_word("(" + rest)
    return Instruction(
        name=name.lstrip("%"),
        shapes=_shapes(shape),
        opcode=opcode.strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments[1:-1],
        attributes=attributes,
    )


def _split_word(text: str) -> tuple[str, str]:
    """Split off the first word, or the first parenthesis with all that is in it.

    In: "(f32[2]{0:T(128)}, s32[]) while(%t), body=%b".
    Out: "(f32[2]{0:T(128)}, s32[])", " while(%t), body=%b".
    """
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    raise ValueError(f"{text[:80]} has a parenthesis that is never closed")


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        numbers = tuple(int(size.strip(" <=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        shapes.append(Shape(dtype, numbers, in_hbm=space is None or space[1] == "0"))
    return tuple(shapes)
