"""`training.rows_per_microbatch: auto`: the most rows whose compiled train step fits the memory."""

from collections.abc import Callable

import jax

from srft_jax.config import UsageError
from srft_jax.mesh import gathered, least_mib_left
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.program_costs import bytes_needed
from srft_jax.planning.train_program import lowered_train_step

# Share of a device's free memory that a step may take: fragments and the runtime need the rest.
USABLE_SHARE = 0.9


def step_mib(run: PlannedRun) -> float:
    """Return XLA's MiB of the train step on each device: state, batch, gradients and the rest.

    All processes must choose the same step, so it is the most that any of them finds.
    """
    return max(gathered(bytes_needed("train_step", lowered_train_step(run)) / 2**20))


def most_rows(
    run: PlannedRun, budget_mib: int, needed_mib: Callable[[PlannedRun], float] = step_mib
) -> tuple[int, str]:
    """Return the most rows that a device's memory holds, and a line that says what was tried.

    Rows are doubled, from one for each data-parallel device.

    Args:
        run: Run; its own number of rows does not matter.
        budget_mib: Memory of each device.
        needed_mib: Memory of the train step; infinity if it cannot be compiled.

    Raises:
        UsageError: not even the fewest rows fit.
    """
    rows = run.data_shards
    needed = {rows: needed_mib(run.with_rows(rows))}
    # Until a step does not fit, or one microbatch holds a whole update.
    while needed[rows] <= budget_mib and _most_microbatches(run.with_rows(rows)) > 1:
        rows *= 2
        needed[rows] = needed_mib(run.with_rows(rows))
    tried = ", ".join(f"{rows} rows need {mib:,.0f}" for rows, mib in needed.items())
    fitting = [rows for rows, mib in needed.items() if mib <= budget_mib]
    if not fitting:
        raise UsageError(
            f"training.rows_per_microbatch = auto: of {budget_mib:,} MiB on each device {tried}; "
            "docs/memory.md says what needs less"
        )
    line = f"training.rows_per_microbatch = {fitting[-1]}: of {budget_mib:,} MiB on each device "
    return fitting[-1], line + tried


def _most_microbatches(run: PlannedRun) -> int:
    return max(run.num_microbatches(stage) for stage in run.stages.all)


def free_mib() -> int:
    """Return the MiB that a step may take on the device with the least, over all processes.

    Raises:
        UsageError: devices do not say what they have left.
    """
    left = least_mib_left()
    if left is None:
        raise UsageError(
            "training.rows_per_microbatch = auto needs training.memory_mib: a "
            f"{jax.default_backend()} device does not say what it has"
        )
    return int(USABLE_SHARE * left)
