"""A program compiled, and what it costs: memory by XLA, work by our count, or the lack of room."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from srft_jax.config import RunError
from srft_jax.planning.chips import GIB
from srft_jax.planning.hlo.count import Count, TripCount, count_module
from srft_jax.planning.hlo.parser import parse_hlo

_MOST_LISTED = 5


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What a compiled program costs on one device; bytes are XLA's accounting.

    Attributes:
        name: Name of the program.
        compile_seconds: Time to compile it on this machine.
        arguments: Bytes of arguments, which exist before.
        added: Bytes of results that do not take an argument's place.
        temp: Bytes of temporaries.
        code: Bytes of the program itself.
        count: Work that it does, as counted here.
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
        """Bytes that a device must have to run it."""
        return self.arguments + self.added + self.temp + self.code


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A program that XLA refuses to compile because a device cannot hold it.

    Attributes:
        name: Name of the program.
        needed: Bytes it would need, if XLA says so.
        largest: Its largest buffers, in XLA's words.
    """

    name: str
    needed: float | None
    largest: tuple[str, ...]


def program_cost(
    name: str, lowered: Any, trip_count: TripCount, num_devices: int
) -> ProgramCost | OutOfMemory:
    """Compile a program and count its work.

    Args:
        name: Name to show.
        lowered: Program as JAX's `lower` returns it.
        trip_count: How often its loops of unknown length run.
        num_devices: Size of its mesh.

    Raises:
        RunError: the compiler fails for another reason than memory.
    """
    began = time.monotonic()
    compiled = _compile(name, lowered)
    if isinstance(compiled, OutOfMemory):
        return compiled
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise _compiler_failure(name, error) from error
    return ProgramCost(
        name=name,
        compile_seconds=time.monotonic() - began,
        count=count_module(parse_hlo(text), trip_count, num_devices),
        **_sizes(compiled),
    )


def bytes_needed(name: str, lowered: Any) -> float:
    """Return what a program needs on each device; infinity if XLA refuses it.

    Raises:
        RunError: the compiler fails for another reason than memory.
    """
    compiled = _compile(name, lowered)
    return math.inf if isinstance(compiled, OutOfMemory) else sum(_sizes(compiled).values())


def _compile(name: str, lowered: Any) -> Any:
    """Return the compiled program as JAX has it, or `OutOfMemory`."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            return OutOfMemory(name, _bytes_in(message), tuple(_largest_buffers(message)))
        raise _compiler_failure(name, error) from error


def _compiler_failure(name: str, error: Exception) -> RunError:
    return RunError(
        f"{name} does not compile ({' '.join(str(error).split())[:300]}); jax and "
        "libtpu must have matching versions: pip install 'srft_jax[tpu]'"
    )


def _sizes(compiled: Any) -> dict[str, float]:
    """Return XLA's bytes on each device, by the field of `ProgramCost`."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "added": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}


def _bytes_in(message: str) -> float | None:
    """In: "... Used 18.51G of 15.75G hbm ...".  Out: 18.51 GiB."""
    match = re.search(r"Used ([\d.]+)([KMGT]?)", message) or re.search(
        r"temporaries \(([\d.]+)([KMGT]?)\)", message
    )
    return float(match[1]) * _UNITS[match[2]] if match else None


def _largest_buffers(message: str) -> Iterator[str]:
    """Yield size, shape and place in the code of the first buffers that XLA lists."""
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1 : 1 + _MOST_LISTED]:
        size = re.match(r"(\S+)", entry)
        shape = re.search(r"Shape: (\S+?)\{", entry)
        place = re.search(r'op_name="([^"]*)"', entry)
        yield " ".join(match[1] if match else "?" for match in (size, shape, place))


def trips_by_scope(scopes: Mapping[str, float], otherwise: float) -> TripCount:
    """Return a function from a loop's op_name to its trips, by the named scope that it is in.

    In: {"head": 4}, 8.  Out: 4 for "jit(train_step)/while/body/jvp(head)/while", else 8.
    """

    def trip_count(op_name: str) -> float:
        words = set(re.findall(r"\w+", op_name))
        return next((trips for scope, trips in scopes.items() if scope in words), otherwise)

    return trip_count


def bytes_on_device(tree: Any) -> float:
    """Return what one device holds of abstract arrays, without XLA's tile padding."""
    return float(
        sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )
    )
