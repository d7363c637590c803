"""Every compilation of a run, by name: a program that compiles step after step is a bug."""

from collections import defaultdict
from typing import Self

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """What XLA compiles while the context is open."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._count = 0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def since_last(self) -> tuple[dict[str, float], str]:
        """Metrics of what was compiled since the last call, and a line about it, empty if none."""
        metrics = {
            "perf/compilations": float(self._count),
            "time/compile": sum(self._seconds.values()),
        }
        slowest = sorted(self._seconds.items(), key=lambda item: -item[1])
        line = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest)
        self._seconds.clear()
        self._count = 0
        return metrics, line

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT:
            self._seconds[str(kwargs["fun_name"])] += duration_secs
            self._count += 1
