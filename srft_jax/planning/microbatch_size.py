"""`training.rows_per_microbatch: auto`: the most rows whose compiled train step fits the memory."""

import dataclasses
from typing import TypeVar

import jax

from srft_jax.config import UsageError
from srft_jax.config.stored_config import stored_config
from srft_jax.mesh import gathered, least_mib_left
from srft_jax.planning.program_costs import bytes_needed
from srft_jax.planning.train_program import lowered_train_step
from srft_jax.setup.outline import Outline, check_sizes

AnyRun = TypeVar("AnyRun", bound=Outline)

# Of what a device has left: fragments and the runtime's own buffers take some.
SHARE_OF_LEFT = 0.9


def with_rows(run: AnyRun) -> tuple[AnyRun, str]:
    """The run with a number of rows, and a line that says how it was found, empty if it was given.

    A run that goes on keeps the number that it was started with. Otherwise the rows are doubled,
    from one for each data-parallel device, until the next step would not fit or one microbatch
    holds a whole update.

    Raises:
        UsageError: not even the fewest rows fit, the memory is not known, or the rows of a run that
            goes on do not split over the mesh.
    """
    if run.config.training.rows_per_microbatch != "auto":
        return run, ""
    stored = stored_config(run.config.run_dir)
    if stored is not None:
        kept = _with(run, stored.training.rows)
        check_sizes(kept)  # of a mesh that may be another one
        return kept, ""
    return most_rows(run, _budget_mib(run))


def most_rows(run: AnyRun, budget: int) -> tuple[AnyRun, str]:
    """The run with the most rows that so many MiB of each device hold, and what was tried.

    Raises:
        UsageError: not even the fewest rows fit.
    """
    rows = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    needed = {rows: _needed_mib(_with(run, rows))}
    while needed[rows] <= budget and _num_microbatches(_with(run, rows)) > 1:
        rows *= 2
        needed[rows] = _needed_mib(_with(run, rows))
    said = ", ".join(f"{rows} rows need {mib:,.0f}" for rows, mib in needed.items())
    fitting = [rows for rows, mib in needed.items() if mib <= budget]
    if not fitting:
        raise UsageError(
            f"training.rows_per_microbatch = auto: of {budget:,} MiB on each device {said}; "
            "docs/memory.md says what needs less"
        )
    line = f"training.rows_per_microbatch = {fitting[-1]}: of {budget:,} MiB on each device {said}"
    return _with(run, fitting[-1]), line


def _with(run: AnyRun, rows: int) -> AnyRun:
    training = dataclasses.replace(run.config.training, rows_per_microbatch=rows)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, training=training))


def _num_microbatches(run: Outline) -> int:
    return max(run.num_microbatches(stage) for stage in run.stages.all)


def _needed_mib(run: Outline) -> float:
    """By XLA, on each device: state, batch, gradients, activations and the program. The most that
    any process finds: they must all choose the same step."""
    lowered = lowered_train_step(run.config, run.model_config, run.objective, run.mesh)
    return max(gathered(bytes_needed("train_step", lowered) / 2**20))


def _budget_mib(run: Outline) -> int:
    """Of the device that has the least, of all processes."""
    given = run.config.training.memory_mib
    if given is not None:
        return given
    left = least_mib_left()
    if left is None:
        raise UsageError(
            "training.rows_per_microbatch = auto needs training.memory_mib: a "
            f"{jax.default_backend()} device does not say what it has"
        )
    return int(SHARE_OF_LEFT * left)
