"""Every compilation of a run, by name: a program that compiles step after step is a bug."""

import dataclasses
from typing import Self

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOOKED_UP = "/jax/compilation_cache/compile_requests_use_cache"
_READ = "/jax/compilation_cache/cache_hits"

# Programs that take less are told together.
_LEAST_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Program:
    """All compilations of one name.

    Attributes:
        name: Of the function.
        seconds: That XLA took, or reading what it made earlier.
        count: Compilations.
        lookups: Of these, how many were looked up in the compilation cache.
        hits: Of these, how many were there.
    """

    name: str
    seconds: float = 0.0
    count: int = 0
    lookups: int = 0
    hits: int = 0

    def __str__(self) -> str:
        """In: train_step.  Out: "train_step in 12.3 s (cache: miss)"."""
        found = {0: "miss", self.lookups: "hit"}.get(self.hits, f"{self.hits} of {self.count} hit")
        cache = found if self.lookups else "off"
        return f"{self.name} in {self.seconds:.1f} s (cache: {cache})"


class Compilations:
    """What XLA compiles while the context is open."""

    def __init__(self) -> None:
        self._programs: dict[str, Program] = {}
        self._lookups = self._hits = 0  # of the program whose compilation is told next

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._note_cache)
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._note_cache)
        jax.monitoring.unregister_event_duration_listener(self._note)

    def since_last(self) -> tuple[dict[str, float], list[Program]]:
        """Metrics of what was compiled since the last call, and the programs, slowest first."""
        programs = sorted(self._programs.values(), key=lambda one: -one.seconds)
        self._programs = {}
        return {
            "perf/compilations": float(sum(one.count for one in programs)),
            "perf/compilation_cache_hits": float(sum(one.hits for one in programs)),
            "time/compile": sum(one.seconds for one in programs),
        }, programs

    def _note_cache(self, event: str, **_: str | int) -> None:
        """JAX tells these before the program's own event, and without its name."""
        self._lookups += event == _LOOKED_UP
        self._hits += event == _READ

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event != _COMPILED:
            return
        name = str(kwargs["fun_name"]).removeprefix("jit(").removesuffix(")")
        before = self._programs.get(name, Program(name))
        self._programs[name] = Program(
            name,
            before.seconds + duration_secs,
            before.count + 1,
            before.lookups + self._lookups,
            before.hits + self._hits,
        )
        self._lookups = self._hits = 0


def listed(programs: list[Program]) -> list[str]:
    """A line each, the quick ones in one."""
    slow = [one for one in programs if one.seconds >= _LEAST_SECONDS]
    quick = [one for one in programs if one.seconds < _LEAST_SECONDS]
    lines = [f"compiled {one}" for one in slow]
    if quick:
        counted = sum(one.count for one in quick)
        seconds = sum(one.seconds for one in quick)
        lines.append(f"compiled {counted} small programs in {seconds:.1f} s")
    return lines
