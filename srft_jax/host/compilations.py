"""Every compilation of a run, by function: one that compiles step after step is a bug.

JAX reports three kinds of events, in this order for each compilation. The first two come without a
name, so they are counted until the third arrives:

    compile_requests_use_cache    XLA's result is looked up in the compilation cache
    cache_hits                    it was there
    backend_compile_duration      fun_name="jit(train_step)", seconds: compiled, or read
"""

import dataclasses
from typing import Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOOKED_UP = "/jax/compilation_cache/compile_requests_use_cache"
_READ = "/jax/compilation_cache/cache_hits"

# Functions that take less share one line of a run's output.
_LEAST_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class CompiledFunction:
    """All compilations of the functions with one name.

    Attributes:
        name: Python's name of the jitted function.
        seconds: Time that XLA took to compile, or JAX to read what XLA made earlier.
        count: Number of compilations.
        lookups: How many of them were looked up in the compilation cache.
        hits: How many of them were in the compilation cache.
    """

    name: str
    seconds: float = 0.0
    count: int = 0
    lookups: int = 0
    hits: int = 0

    def __str__(self) -> str:
        """In: train_step.  Out: "train_step in 12.3 s (cache: miss)"."""
        if not self.lookups:
            cache = "off"
        else:
            partly = f"{self.hits} of {self.count} hit"
            cache = {0: "miss", self.lookups: "hit"}.get(self.hits, partly)
        return f"{self.name} in {self.seconds:.1f} s (cache: {cache})"


class Compilations:
    """Context manager that counts what XLA compiles while it is open."""

    def __init__(self) -> None:
        self._functions: dict[str, CompiledFunction] = {}
        # Events without a name since the last compilation: they belong to the next one.
        self._lookups = self._hits = 0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._note_cache)
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._note_cache)
        jax.monitoring.unregister_event_duration_listener(self._note)

    def since_last(self) -> tuple[dict[str, float], list[CompiledFunction]]:
        """Return metrics of the compilations since the last call, and their functions.

        The functions come slowest first.
        """
        functions = sorted(self._functions.values(), key=lambda function: -function.seconds)
        self._functions = {}
        return {
            "perf/compilations": float(sum(function.count for function in functions)),
            "perf/compilation_cache_hits": float(sum(function.hits for function in functions)),
            "time/compile": sum(function.seconds for function in functions),
        }, functions

    def _note_cache(self, event: str, **_: str | int) -> None:
        """Count an event of the compilation cache."""
        self._lookups += event == _LOOKED_UP
        self._hits += event == _READ

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Add a compilation to its function, with the cache's events before it."""
        if event != _COMPILED:
            return
        # In: "jit(train_step)".  Out: "train_step".
        name = str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")")
        before = self._functions.get(name, CompiledFunction(name))
        self._functions[name] = CompiledFunction(
            name=name,
            seconds=before.seconds + duration_secs,
            count=before.count + 1,
            lookups=before.lookups + self._lookups,
            hits=before.hits + self._hits,
        )
        self._lookups = self._hits = 0


def compilation_lines(functions: list[CompiledFunction]) -> list[str]:
    """Return a line for each function, and one for all that took less than 0.1 s.

    In: train_step, which took 12.3 s, and 8 compilations that took 0.1 s together.
    Out: "compiled train_step in 12.3 s (cache: miss)", "compiled 8 small programs in 0.1 s".
    """
    slow = [function for function in functions if function.seconds >= _LEAST_SECONDS]
    quick = [function for function in functions if function.seconds < _LEAST_SECONDS]
    lines = [f"compiled {function}" for function in slow]
    if quick:
        count = sum(function.count for function in quick)
        seconds = sum(function.seconds for function in quick)
        lines.append(f"compiled {count} small programs in {seconds:.1f} s")
    return lines
