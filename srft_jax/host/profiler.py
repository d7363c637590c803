"""Traces of chosen steps, for TensorBoard or xprof: what ran when, on host and device.

Device work carries the names of its phases (attention, mlp, head, optimizer), the host's those of
the step (rollout, train).
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import jax
from etils import epath

from srft_jax.config import RunConfig
from srft_jax.config.paths import on_object_store


class Profiler:
    """Writes run_dir/profile/step_N for each N of `training.profile_steps`.

    Every process writes the files of its own devices; of several, into step_N/process_K, as XLA
    names files by the machine. Leaving the context ends a trace that an error has cut short.
    """

    def __init__(self, config: RunConfig) -> None:
        self._folder = epath.Path(config.run_dir) / "profile"
        self._steps = frozenset(config.training.profile_steps)
        self._open = contextlib.ExitStack()  # of the step at hand

    def begin(self, step: int) -> None:
        """Before anything of a step, which counts from 1."""
        if step not in self._steps:
            return
        place = self._folder / f"step_{step}"
        if jax.process_count() > 1:
            place /= f"process_{jax.process_index()}"
        folder = self._open.enter_context(_written(place))
        self._open.enter_context(jax.profiler.trace(folder))
        self._open.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def end(self) -> None:
        """After the step's last work is done."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@contextlib.contextmanager
def _written(path: epath.Path) -> Iterator[epath.Path]:
    """A directory whose files end up in `path`: XLA's profiler writes to local disks alone."""
    if not on_object_store(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)
        for file in Path(local).rglob("*"):
            if file.is_file():
                (path / file.relative_to(local)).write_bytes(file.read_bytes())
