"""The batch of a skipped update, kept for the verb `replay`."""

import dataclasses
import io
import os
from typing import Any

import jax
import numpy as np
from etils import epath

from srft_jax.batch import Batch, Normalisers, Rows
from srft_jax.config import UsageError


def save_batch(run_dir: str, step: int, stage: str, batch: Batch) -> str:
    """Write run_dir/replay/step_N.npz in place of an earlier one, and return its path.

    The batch says no objective, so the name of its stage is written with it.

    Only the first of several processes writes.
    """
    path = _folder(run_dir) / f"step_{step}.npz"
    if jax.process_index() != 0:
        return os.fspath(path)
    batch = jax.device_get(batch)
    arrays = vars(batch.rows) | vars(batch.normalisers)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        stage=stage,
        num_microbatches=batch.num_microbatches,
        on_policy=batch.on_policy,
        **arrays,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    for earlier in path.parent.glob("step_*.npz"):
        earlier.unlink()
    path.write_bytes(file.getvalue())
    return os.fspath(path)


def saved_batch(run_dir: str) -> tuple[int, str, Batch] | None:
    """Return the step, the name of the stage and the batch that `save_batch` wrote last, None if it
    never did.

    Raises:
        UsageError: the file lacks something, as it was written by an earlier version.
    """
    paths = {int(path.stem.removeprefix("step_")): path for path in _folder(run_dir).glob("*.npz")}
    if not paths:
        return None
    step = max(paths)
    row_names, count_names = (
        [field.name for field in dataclasses.fields(part)] for part in (Rows, Normalisers)
    )
    with np.load(io.BytesIO(paths[step].read_bytes())) as arrays:
        needed = {"stage", "num_microbatches", "on_policy", *row_names, *count_names}
        missing = sorted(needed - set(arrays.files))
        if missing:
            raise UsageError(
                f"{paths[step]} has no {', '.join(missing)}: it was written by an earlier version, "
                "which alone can replay it"
            )
        rows: Any = {name: arrays[name] for name in row_names}
        counts: Any = {name: arrays[name] for name in count_names}
        batch = Batch(
            rows=Rows(**rows),
            normalisers=Normalisers(**counts),
            num_microbatches=arrays["num_microbatches"],
            on_policy=bool(arrays["on_policy"]),
        )
        return step, str(arrays["stage"]), batch


def _folder(run_dir: str) -> epath.Path:
    return epath.Path(run_dir) / "replay"
