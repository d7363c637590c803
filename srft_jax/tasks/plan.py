"""Verb `plan`: whether a run fits a machine, and how fast it would go there, before there is one.

The run's own programs are compiled for the topology from abstract shapes; see docs/plan.md.
"""

import json
import sys

from srft_jax.config import RunConfig, UsageError
from srft_jax.planning import table
from srft_jax.planning.microbatch_size import SHARE_OF_LEFT, most_rows
from srft_jax.planning.planned_run import planned_run
from srft_jax.planning.plans import compiled_plan, estimated_plan
from srft_jax.planning.scaling import scaled_plans
from srft_jax.planning.search import search
from srft_jax.planning.topology import Topology, prepare_backend, topology_of
from srft_jax.setup.outline import Outline


def plan(config: RunConfig) -> int:
    """Prints the plan; that a run does not fit is an answer, not an error.

    Returns:
        Exit code: 0.
    """
    wanted = config.plan
    if wanted.topology is None:
        raise UsageError("plan needs plan.topology, e.g. --topology v5p:4x4x4, cpu:8 or h100:8")
    prepare_backend(wanted.topology)
    topology = topology_of(wanted.topology, config.mesh.slices)
    if wanted.scaling and topology.chip.kind != "tpu":
        raise UsageError(f"plan.scaling plans for slices of TPUs, not for {topology.name}")
    run = planned_run(config, topology.devices)
    if wanted.search:
        candidates = search(run, topology, _report)
        print(table.search_text(candidates) + "\n")
        run = candidates[0].run
    elif run.config.training.rows_per_microbatch == "auto" and topology.chip.kind != "gpu":
        run = _with_rows(run, topology)
    if topology.chip.kind == "gpu":
        print(
            f"{topology.name}: by arithmetic alone, as nothing here compiles for GPUs, and of the "
            "updates alone: the sampler's parameters, its cache and its time come on top\n"
        )
        found = estimated_plan(run, topology)
    else:
        found = compiled_plan(run, topology, _report)
    print(table.plan_text(found))
    scaling = scaled_plans(run, topology, _report) if wanted.scaling else {}
    if scaling:
        print("\n" + table.scaling_text(scaling))
    if wanted.json:
        print(json.dumps(table.plan_json(found, scaling)))
    return 0


def _with_rows(run: Outline, topology: Topology) -> Outline:
    """As many rows as a run would choose on devices with nothing else in their memory."""
    budget = run.config.training.memory_mib or int(SHARE_OF_LEFT * topology.chip.hbm / 2**20)
    _report("compiling train for more and more rows")
    run, line = most_rows(run, budget)
    _report(line)
    return run


def _report(line: str) -> None:
    """Progress is no part of the result."""
    print(line, file=sys.stderr, flush=True)
