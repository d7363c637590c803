"""What a compiled program computes, reads and exchanges on one device, loops counted as they run.

XLA's own figures count a loop's body once and a kernel not at all. Here the count has

    flops        2 for each multiplication and addition of a matmul
    hbm_bytes    bytes that instructions and fusions read and write in HBM; fast memory is free, and
                 of an array that is sliced or updated in place only the part counts
    collectives  bytes that a device sends, by kind of collective and group of devices
    summed       bytes that a device sums with its counterparts in other slices

A loop over a fixed range runs as often as its condition says; the caller knows how often any other
loop runs. Of a condition's branches, the one with the most work counts.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable

from srft_jax.planning.hlo.async_collectives import started_elsewhere
from srft_jax.planning.hlo.device_groups import Group, device_group
from srft_jax.planning.hlo.hbm_traffic import hbm_bytes
from srft_jax.planning.hlo.matmul_flops import matmul_flops
from srft_jax.planning.hlo.pallas_kernels import declared_work, splash_work
from srft_jax.planning.hlo.parser import Computation, Instruction, Module
from srft_jax.planning.hlo.trip_counts import fixed_trip_count

# Share of its operand that a device in a group of n sends, by ring algorithms.
_SENT: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}

TripCount = Callable[[str], float]  # op_name of a loop of unknown length -> how often it runs


@dataclasses.dataclass(frozen=True)
class Count:
    """Work of one device; `collectives` has bytes sent within a slice by (kind, group)."""

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


def count_module(module: Module, trip_count: TripCount, num_devices: int) -> Count:
    """Count the work of a whole program on one device.

    Args:
        module: Parsed program.
        trip_count: How often a loop runs whose range the program does not fix.
        num_devices: Size of the mesh that the program is compiled for.
    """
    return _Counter(module, trip_count, num_devices).count_computation(module.entry)


def _total(counts: Iterable[Count]) -> Count:
    return functools.reduce(lambda a, b: a + b, counts, Count())


@dataclasses.dataclass(frozen=True)
class _Counter:
    module: Module
    trip_count: TripCount
    num_devices: int

    def count_computation(self, computation: Computation) -> Count:
        return _total(
            self._count_instruction(instruction, computation)
            for instruction in computation.instructions.values()
        )

    def _count_instruction(self, instruction: Instruction, computation: Computation) -> Count:
        opcode = instruction.opcode
        if opcode == "while":
            trips = fixed_trip_count(instruction, self.module)
            if trips is None:
                trips = self.trip_count(instruction.op_name)
            body = self.module.called_by(instruction, "body")
            return self.count_computation(body).times(trips)
        if opcode == "conditional":
            return max(
                self._count_branches(instruction),
                key=lambda branch: (branch.flops, branch.hbm_bytes),
            )
        if opcode == "call":
            return self.count_computation(self.module.called_by(instruction, "to_apply"))
        moved = hbm_bytes(instruction, computation, self.module)
        if opcode in ("fusion", "async-start"):
            # Inside, matmuls and collectives count; the bytes between them stay on the chip.
            called = self.module.called_by(instruction)
            inside = self.count_computation(called)
            return Count(inside.flops, moved, _fused_collectives(called, inside))
        if opcode == "custom-call":
            work = declared_work(instruction) or splash_work(instruction, computation)
            return Count(work.flops, work.bytes) if work else Count(0.0, moved)
        if opcode == "send" and "xla_megascale" in instruction.attributes:
            # libtpu's all-reduce across slices: a slice's sum leaves through the host.
            sent = computation.instructions[instruction.operands[0]]
            return Count(0.0, moved, summed=sum(shape.bytes for shape in sent.shapes))
        exchanged = self._bytes_sent(instruction, computation)
        return Count(matmul_flops(instruction, computation), moved, exchanged)

    def _count_branches(self, conditional: Instruction) -> list[Count]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        names = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
        for attribute in ("true_computation", "false_computation"):
            names += filter(None, [conditional.computation_name(attribute)])
        return [self.count_computation(self.module.computations[name]) for name in names]

    def _bytes_sent(
        self, instruction: Instruction, computation: Computation
    ) -> Counter[tuple[str, Group]]:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _SENT or started_elsewhere(instruction, computation, self.module):
            return Counter()
        group = device_group(instruction, self.num_devices)
        operands = (computation.instructions[name] for name in instruction.operands)
        size = sum(shape.bytes for operand in operands for shape in operand.shapes)
        return Counter({(kind, group): size * _SENT[kind](len(group))} if len(group) > 1 else {})


def _fused_collectives(called: Computation, inside: Count) -> Counter[tuple[str, Group]]:
    """Return what a fusion sends: libtpu writes a reduce-scatter as an all-reduce and a slice."""
    reduces = [value for value in called.instructions.values() if value.opcode == "all-reduce"]
    if not reduces or not _is_only_sliced(called, reduces[0]):
        return inside.collectives
    return Counter(
        {
            ("reduce-scatter", group) if kind == "all-reduce" else (kind, group): sent
            / (2 if kind == "all-reduce" else 1)
            for (kind, group), sent in inside.collectives.items()
        }
    )


def _is_only_sliced(called: Computation, reduce: Instruction) -> bool:
    """Return whether a device keeps only a slice of the sum, directly or behind renamings."""
    users = called.users[reduce.name]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "get-tuple-element"):
        users = called.users[users[0].name]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
