"""Traces of chosen steps, for TensorBoard or xprof: what ran when, on host and device.

Device work carries the names of its phases (attention, mlp, head, optimizer), host work the names
of the step's phases (rollout, train).
"""

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Self

import jax
from etils import epath

from srft_jax.config.paths import on_object_store


class Profiler:
    """Writes folder/step_N for each chosen step N.

    Every process writes the files of its own devices. Several processes write into
    step_N/process_K, as XLA names files by the machine. Leaving the context ends a trace that an
    error has cut short.
    """

    def __init__(self, folder: epath.PathLike, steps: Collection[int]) -> None:
        self._folder = epath.Path(folder)
        self._steps = frozenset(steps)
        self._trace = contextlib.ExitStack()  # holds the trace of the step at hand, if it has one

    def begin(self, step: int) -> None:
        """Start the trace of a step, before its first work; steps count from 1."""
        if step not in self._steps:
            return
        place = self._folder / f"step_{step}"
        if jax.process_count() > 1:
            place /= f"process_{jax.process_index()}"
        # Entered first, so that it is left last: files are copied after the trace has been written.
        local_folder = self._trace.enter_context(_local_folder(place))
        self._trace.enter_context(jax.profiler.trace(local_folder))
        self._trace.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def end(self) -> None:
        """End the trace, after the step's last work is done."""
        self._trace.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@contextlib.contextmanager
def _local_folder(path: epath.Path) -> Iterator[epath.Path]:
    """A local directory whose files end up in `path`: XLA's profiler writes to local disks only."""
    if not on_object_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        for file in Path(local).rglob("*"):
            if file.is_file():
                (path / file.relative_to(local)).write_bytes(file.read_bytes())
