"""Verb `plan`: whether a run fits a machine, and how fast it would go there, before there is one.

The run's own programs are compiled for the topology from abstract shapes; see docs/plan.md.
"""

import json

from srft_jax.config import RunConfig, UsageError
from srft_jax.planning.microbatch_size import USABLE_SHARE, most_rows
from srft_jax.planning.plan_text import format_plan, format_scaling, format_search, plan_as_json
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.plans import compile_plan, estimate_plan
from srft_jax.planning.scaling import plan_scaling
from srft_jax.planning.search import search
from srft_jax.planning.topology import Topology
from srft_jax.setup.plan_checks import outline_for_plan
from srft_jax.tasks.planned import planned


def plan(config: RunConfig, tools: PlanningTools = PlanningTools()) -> int:
    """Print the plan; that a run does not fit is an answer, not an error.

    Args:
        config: Configuration of the run, and of the plan.
        tools: What the plan is made with.

    Returns:
        Exit code: 0.
    """
    section = config.plan
    if section.topology is None:
        raise UsageError("plan needs plan.topology, e.g. --topology v5p:4x4x4, cpu:8 or h100:8")
    tools.prepare_backend(section.topology)
    machine = tools.find_topology(section.topology, config.mesh.slices)
    if section.scaling and machine.chip.kind != "tpu":
        raise UsageError(f"plan.scaling plans for slices of TPUs, not for {machine.name}")
    run = planned(outline_for_plan(config, machine.devices))
    if section.search:
        candidates = search(run, machine, tools, seconds=section.search_seconds)
        print(format_search(candidates) + "\n")
        run = candidates[0].run
    elif run.training.rows_per_microbatch == "auto" and machine.chip.kind != "gpu":
        run = _with_most_rows(run, machine, tools)
    if machine.chip.kind == "gpu":
        print(
            f"{machine.name}: by arithmetic alone, as nothing here compiles for GPUs, and of the "
            "updates alone: the sampler's parameters, its cache and its time come on top\n"
        )
        result = estimate_plan(run, machine)
    else:
        result = compile_plan(run, machine, tools)
    print(format_plan(result))
    scaling = plan_scaling(run, machine, tools) if section.scaling else {}
    if scaling:
        print("\n" + format_scaling(scaling))
    if section.json:
        print(json.dumps(plan_as_json(result, scaling)))
    return 0


def _with_most_rows(run: PlannedRun, machine: Topology, tools: PlanningTools) -> PlannedRun:
    """Return the run with the rows that it would choose on devices with nothing else in memory."""
    budget = run.training.memory_mib or int(USABLE_SHARE * machine.chip.hbm / 2**20)
    tools.log("compiling train for more and more rows")
    rows, line = most_rows(run, budget, tools.needed_mib)
    tools.log(line)
    return run.with_rows(rows)
