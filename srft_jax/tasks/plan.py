"""Verb `plan`: whether a run fits a machine, and how fast it would go there, before there is one.

The run's own programs are compiled for the topology from abstract shapes; see docs/plan.md.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable

from srft_jax.config import RunConfig, UsageError
from srft_jax.planning import plans, topology
from srft_jax.planning.microbatch_size import USABLE_SHARE, most_rows, step_mib
from srft_jax.planning.plan_text import format_plan, format_scaling, format_search, plan_as_json
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.plans import Cost, compile_plan, estimate_plan
from srft_jax.planning.scaling import plan_scaling
from srft_jax.planning.search import search
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import Workload
from srft_jax.setup.plan_checks import outline_for_plan
from srft_jax.tasks.planned import planned


def plan(
    config: RunConfig,
    *,
    prepare_backend: Callable[[str], object] = topology.prepare_backend,
    find_topology: Callable[[str, int], Topology] = topology.find_topology,
    train_cost: Callable[[PlannedRun, Workload], Cost] = plans.train_cost,
    sampler_costs: Callable[..., Iterable[Cost]] = plans.sampler_costs,
    needed_mib: Callable[[PlannedRun], float] = step_mib,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Print the plan; that a run does not fit is an answer, not an error.

    Args:
        config: Configuration of the run, and of the plan.
        prepare_backend: Sets JAX up for a topology.
        find_topology: Returns the devices of a number of slices.
        train_cost: Compiles one update.
        sampler_costs: Compiles the sampler's programs.
        needed_mib: Memory of the train step, to choose the rows of a microbatch.
        clock: Time in seconds, which limits a search.

    Returns:
        Exit code: 0.
    """
    section = config.plan
    if section.topology is None:
        raise UsageError("plan needs plan.topology, e.g. --topology v5p:4x4x4, cpu:8 or h100:8")
    prepare_backend(section.topology)
    machine = find_topology(section.topology, config.mesh.slices)
    if section.scaling and machine.chip.kind != "tpu":
        raise UsageError(f"plan.scaling plans for slices of TPUs, not for {machine.name}")
    run = planned(outline_for_plan(config, machine.devices))
    if section.search:
        candidates = search(
            run,
            machine,
            _log,
            seconds=section.search_seconds,
            train_cost=train_cost,
            clock=clock,
        )
        print(format_search(candidates) + "\n")
        run = candidates[0].run
    elif run.training.rows_per_microbatch == "auto" and machine.chip.kind != "gpu":
        run = _with_most_rows(run, machine, needed_mib)
    if machine.chip.kind == "gpu":
        print(
            f"{machine.name}: by arithmetic alone, as nothing here compiles for GPUs, and of the "
            "updates alone: the sampler's parameters, its cache and its time come on top\n"
        )
        result = estimate_plan(run, machine)
    else:
        result = compile_plan(
            run, machine, _log, train_cost=train_cost, sampler_costs=sampler_costs
        )
    print(format_plan(result))
    scaling = {}
    if section.scaling:
        scaling = plan_scaling(
            run, machine, _log, find_topology=find_topology, train_cost=train_cost
        )
    if scaling:
        print("\n" + format_scaling(scaling))
    if section.json:
        print(json.dumps(plan_as_json(result, scaling)))
    return 0


def _with_most_rows(
    run: PlannedRun, machine: Topology, needed_mib: Callable[[PlannedRun], float]
) -> PlannedRun:
    """Return the run with the rows that it would choose on devices with nothing else in memory."""
    budget = run.training.memory_mib or int(USABLE_SHARE * machine.chip.hbm / 2**20)
    _log("compiling train for more and more rows")
    rows, line = most_rows(run, budget, needed_mib)
    _log(line)
    return run.with_rows(rows)


def _log(line: str) -> None:
    """Show progress, which is no part of the result."""
    print(line, file=sys.stderr, flush=True)
