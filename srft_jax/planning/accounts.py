"""A program compiled, and what it takes: XLA's memory, our counts; or why it does not fit."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from srft_jax.config import RunError
from srft_jax.planning.chips import GIB
from srft_jax.planning.hlo.count import Count, Trips, count
from srft_jax.planning.hlo.text import parse

_MOST_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Account:
    """Of one device, by XLA: bytes of its arguments and so on; ours: the count.

    Attributes:
        name: Of the program.
        compile_seconds: Here.
        arguments: Bytes that are there before.
        added: Bytes of results that do not take an argument's place.
        temp: Bytes in between.
        code: Bytes of the program itself.
        count: What it computes, reads and exchanges.
    """

    name: str
    compile_seconds: float
    arguments: float
    added: float
    temp: float
    code: float
    count: Count

    @property
    def needed(self) -> float:
        return self.arguments + self.added + self.temp + self.code


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A program that XLA refuses to compile as the device does not hold it.

    Attributes:
        name: Of the program.
        needed: Bytes, where XLA says so.
        largest: Its largest buffers, as XLA names them.
    """

    name: str
    needed: float | None
    largest: tuple[str, ...]


def account(name: str, lowered: Any, trips: Trips, num_devices: int) -> Account | OutOfMemory:
    """Compiles a program.

    Args:
        name: Shown.
        lowered: As JAX's `lower` gives it.
        trips: How often its loops of unknown length run.
        num_devices: Of its mesh.

    Raises:
        RunError: the compiler fails for another reason than memory.
    """
    began = time.monotonic()
    compiled = _compiled(name, lowered)
    if isinstance(compiled, OutOfMemory):
        return compiled
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise _failure(name, error) from error
    return Account(
        name=name,
        compile_seconds=time.monotonic() - began,
        count=count(parse(text), trips, num_devices),
        **_sizes(compiled),
    )


def bytes_needed(name: str, lowered: Any) -> float:
    """Of a program on each device; infinite where XLA refuses it; counts nothing.

    Raises:
        RunError: the compiler fails for another reason than memory.
    """
    compiled = _compiled(name, lowered)
    return math.inf if isinstance(compiled, OutOfMemory) else sum(_sizes(compiled).values())


def _compiled(name: str, lowered: Any) -> Any:
    """As JAX gives it, or `OutOfMemory`."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        if "RESOURCE_EXHAUSTED" in said:
            return OutOfMemory(name, _needed(said), tuple(_largest(said)))
        raise _failure(name, error) from error


def _failure(name: str, error: Exception) -> RunError:
    return RunError(
        f"{name} does not compile ({' '.join(str(error).split())[:300]}); of jax and libtpu only "
        "versions made for each other work: pip install 'srft_jax[tpu]'"
    )


def _sizes(compiled: Any) -> dict[str, float]:
    """By XLA, on each device; see `Account`."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "added": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}


def _needed(said: str) -> float | None:
    """In: "... Used 18.51G of 15.75G hbm ...".  Out: 18.51 GiB."""
    found = re.search(r"Used ([\d.]+)([KMGT]?)", said) or re.search(
        r"temporaries \(([\d.]+)([KMGT]?)\)", said
    )
    return float(found[1]) * _UNITS[found[2]] if found else None


def _largest(said: str) -> Iterator[str]:
    """From XLA's list of allocations: size, shape and where in the code it comes from."""
    for entry in re.split(r"\n\s*\d+\. Size: ", said)[1 : 1 + _MOST_LISTED]:
        size = entry.split(None, 1)[0]
        shape = re.search(r"Shape: (\S+?)\{", entry)
        where = re.search(r'op_name="([^"]*)"', entry)
        yield " ".join(
            part[1] if part else "?" for part in (re.match(r"(\S+)", size), shape, where)
        )


def loops(by_scope: Mapping[str, float], otherwise: float) -> Callable[[str], float]:
    """Trips of loops by the named scope that they are in.

    In: {"head": 4}, 8.  Out: 4 for "jit(train_step)/while/body/jvp(head)/while", else 8.
    """

    def trips(op_name: str) -> float:
        words = set(re.findall(r"\w+", op_name))
        return next((times for scope, times in by_scope.items() if scope in words), otherwise)

    return trips


def bytes_on_device(tree: Any) -> float:
    """Of abstract arrays, what one device holds, padding aside."""
    return float(
        sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )
    )
