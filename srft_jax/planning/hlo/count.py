"""What a compiled program computes, reads and exchanges on one device, loops counted as they run.

XLA's own figures count a loop's body once and a kernel's not at all. Counted here:

    flops        2 for each multiplication and addition of a product of matrices
    hbm_bytes    what instructions and fusions read and write in the device's memory; what stays in
                 its fast memory is free, and of what is sliced or updated in place only the part
    collectives  bytes that a device sends, by kind and group of devices
    summed       bytes of which a device sums its own with those of its like in other slices

A loop over a fixed range runs as often as its condition says. Any other is the caller's to know. Of
a condition's branches the one with the most work counts.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable

from srft_jax.planning.hlo.async_pairs import goes_on
from srft_jax.planning.hlo.bytes import bytes_of
from srft_jax.planning.hlo.flops import flops_of
from srft_jax.planning.hlo.groups import Group, group_of
from srft_jax.planning.hlo.kernels import declared, of_splash
from srft_jax.planning.hlo.loops import fixed_trips
from srft_jax.planning.hlo.text import Computation, Instruction, Module

# Of the operand, what a device of a group of n sends, as rings do it.
_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}

Trips = Callable[[str], float]  # op_name of a loop of unknown length -> how often it runs


@dataclasses.dataclass(frozen=True)
class Count:
    """Of one device. Collectives: bytes sent by (kind, group), within a slice."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Counter[tuple[str, Group]] = dataclasses.field(default_factory=Counter)
    summed: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
            Counter(self.collectives) + other.collectives,
            self.summed + other.summed,
        )

    def times(self, number: float) -> "Count":
        exchanged = Counter({key: number * sent for key, sent in self.collectives.items()})
        return Count(number * self.flops, number * self.hbm_bytes, exchanged, number * self.summed)


def count(module: Module, trips: Trips, num_devices: int) -> Count:
    """Of a whole program.

    Args:
        module: As `text.parse` reads it.
        trips: How often a loop runs whose range the program does not fix.
        num_devices: Of the mesh that it is compiled for.
    """
    return _Counter(module, trips, num_devices).of(module.entry)


def total(counts: Iterable[Count]) -> Count:
    return functools.reduce(lambda a, b: a + b, counts, Count())


@dataclasses.dataclass(frozen=True)
class _Counter:
    module: Module
    trips: Trips
    num_devices: int

    def of(self, computation: Computation) -> Count:
        return total(self._of(one, computation) for one in computation.instructions.values())

    def _called(self, instruction: Instruction, attribute: str) -> Computation | None:
        name = instruction.named(attribute)
        return self.module.computations[name] if name else None

    def _of(self, instruction: Instruction, computation: Computation) -> Count:
        kind = instruction.opcode
        if kind == "while":
            body = self._called(instruction, "body")
            assert body is not None
            return self.of(body).times(self._trips(instruction))
        if kind == "conditional":
            return max(self._branches(instruction), key=lambda one: (one.flops, one.hbm_bytes))
        if kind == "call":
            called = self._called(instruction, "to_apply")
            return self.of(called) if called else Count()
        moved = bytes_of(instruction, computation, self.module)
        if kind in ("fusion", "async-start"):
            called = self._called(instruction, "calls")
            assert called is not None
            inside = self.of(called)
            return Count(inside.flops, moved, self._scattered(called, inside))
        if kind == "custom-call":
            work = declared(instruction) or of_splash(instruction, computation)
            return Count(work.flops, work.bytes) if work else Count(0.0, moved)
        if kind == "send" and "xla_megascale" in instruction.attributes:
            # libtpu's all-reduce across slices: what one slice has summed goes out by the host.
            sent = computation.instructions[instruction.operands[0]]
            return Count(0.0, moved, summed=sum(shape.bytes for shape in sent.shapes))
        exchanged = self._exchanged(instruction, computation)
        return Count(flops_of(instruction, computation), moved, exchanged)

    def _branches(self, instruction: Instruction) -> list[Count]:
        found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"%([\w.\-]+)", found[1]) if found else []
        names += [
            n for key in ("true_computation", "false_computation") if (n := instruction.named(key))
        ]
        return [self.of(self.module.computations[name]) for name in names]

    def _exchanged(
        self, instruction: Instruction, computation: Computation
    ) -> Counter[tuple[str, Group]]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _SENT or goes_on(instruction, computation, self.module):
            return Counter()
        group = group_of(instruction, self.num_devices)
        operands = (computation.instructions[name] for name in instruction.operands)
        size = sum(shape.bytes for operand in operands for shape in operand.shapes)
        return Counter({(kind, group): size * _SENT[kind](len(group))} if len(group) > 1 else {})

    def _scattered(self, called: Computation, inside: Count) -> Counter[tuple[str, Group]]:
        """libtpu's reduce-scatter: a fusion of an all-reduce and the slice that a device keeps."""
        reduces = [one for one in called.instructions.values() if one.opcode == "all-reduce"]
        if not reduces or not _is_slice_of(called, reduces[0]):
            return inside.collectives
        return Counter(
            {
                ("reduce-scatter" if kind == "all-reduce" else kind, group): sent
                / (2 if kind == "all-reduce" else 1)
                for (kind, group), sent in inside.collectives.items()
            }
        )

    def _trips(self, loop: Instruction) -> float:
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return float(found[1])
        trips = fixed_trips(loop, self.module)
        return self.trips(loop.op_name) if trips is None else trips


def _is_slice_of(called: Computation, reduce: Instruction) -> bool:
    users = called.users[reduce.name]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "get-tuple-element"):
        users = called.users[users[0].name]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
