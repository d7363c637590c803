"""The files of a run directory that grow line by line: metrics, samples and TensorBoard events.

The JSONL files are the record: the report reads them, resuming cuts them back to the checkpoint.
TensorBoard's events are a copy for looking at; they are never read. On an object store, which
cannot append, a file is written anew with each line, and TensorBoard's, whose writer knows local
files alone, is written elsewhere and copied.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
from etils import epath
from tensorboard.summary import Writer

from srft_jax.config import UsageError
from srft_jax.config.paths import on_object_store

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class RunWriter:
    """Appends to the files of one run directory, created if need be.

    Every call is on disk when it returns, so a kill loses nothing. Only the first of several
    processes writes; all of them give the same lines.
    """

    def __init__(self, run_dir: str) -> None:
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._run_dir = epath.Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._events_dir, self._local = self._run_dir / "tensorboard", None
        if on_object_store(self._run_dir):
            self._local = tempfile.TemporaryDirectory()
        self._events = Writer(self._local.name if self._local else os.fspath(self._events_dir))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the step and the values, as Python floats at full precision, keys sorted.

        A value that is not finite is null, as JSON has no word for it, and is no event.
        """
        if not self._writes:
            return
        scalars = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        _append(self._run_dir / METRICS, [dict.fromkeys(scalars) | finite | {"step": int(step)}])
        for name, value in sorted(finite.items()):
            self._events.add_scalar(name, value, int(step))
        self._events.flush()
        self._copy_events()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each row, which holds its integer `step` for `cut_back`."""
        if self._writes:
            _append(self._run_dir / SAMPLES, rows)

    def close(self) -> None:
        """Complete TensorBoard's events."""
        if not self._writes:
            return
        self._events.close()
        if self._local:
            self._copy_events()
            self._local.cleanup()

    def _copy_events(self) -> None:
        if self._local:
            for file in epath.Path(self._local.name).iterdir():
                (self._events_dir / file.name).write_bytes(file.read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl in order, without their nulls; none without such a file.

    Raises:
        UsageError: a line is not a JSON object of numbers and nulls with an integer `step`.
    """
    path = epath.Path(run_dir) / METRICS
    rows = _read(path)
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if not isinstance(value, int | float | None):
                raise UsageError(f"{path}, line {number}: {name} is {value!r}, not a number")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def read_samples(run_dir: str) -> list[dict[str, Any]]:
    """Return the lines of samples.jsonl in order, none if there is no such file.

    Raises:
        UsageError: a line is not a JSON object with an integer `step`.
    """
    return _read(epath.Path(run_dir) / SAMPLES)


def cut_back(run_dir: str, step: int) -> None:
    """Drop lines after `step` from metrics.jsonl and samples.jsonl: a resumed run repeats none.

    A file is replaced as a whole or not at all. A last line without its newline is what a kill in
    the middle of a write leaves; it is dropped too.

    Raises:
        UsageError: a line is malformed.
    """
    for path in (epath.Path(run_dir) / METRICS, epath.Path(run_dir) / SAMPLES):
        if not path.exists():
            continue
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        rows = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
        kept = b"".join(line for line, row in zip(lines, rows, strict=True) if row["step"] <= step)
        if kept != content:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(kept)
            temporary.replace(path)


def _append(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    data = b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows)
    if on_object_store(path):
        path.write_bytes(path.read_bytes() + data if path.exists() else data)
        return
    with path.open("ab") as file:
        file.write(data)


def _read(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: epath.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UsageError(f"{path}, line {number}: {error}") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise UsageError(f"{path}, line {number}: not a JSON object with an integer `step`")
    return row
