"""The programs of a run, compiled for a plan: what a plan asks of libtpu or XLA, in one record."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from srft_jax.mesh import row_shards
from srft_jax.planning import topology, workload
from srft_jax.planning.memory import policy_params
from srft_jax.planning.microbatch_size import step_mib
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.program_costs import OutOfMemory, ProgramCost, program_cost, trips_by_scope
from srft_jax.planning.sampler_programs import Lowered, lowered_sampler
from srft_jax.planning.topology import Topology
from srft_jax.planning.train_program import lowered_train_step
from srft_jax.planning.workload import Workload
from srft_jax.rollout.cache import CacheShape

Cost = ProgramCost | OutOfMemory
Log = Callable[[str], None]  # shows a line of progress


def train_cost(run: PlannedRun, work: Workload) -> Cost:
    """Compile one update."""
    trip_count = workload.train_trip_count(run, work)
    return program_cost("train", lowered_train_step(run), trip_count, run.mesh.size)


def lowered_programs(run: PlannedRun, work: Workload, shape: CacheShape) -> Iterator[Lowered]:
    """Yield each of the sampler's programs, ready to be compiled."""
    decoding = run.decode_mesh()
    return lowered_sampler(
        policy_params(run),
        run.model_config,
        decoding,
        shape,
        sampling=run.sampling,
        pass_rows=workload.prefill_rows(run, work, shape, row_shards(decoding)),
        forced=run.lengths.longest_prefix > 0,
    )


def sampler_costs(run: PlannedRun, work: Workload, shape: CacheShape, log: Log) -> Iterable[Cost]:
    """Compile each of the sampler's programs."""
    shards = row_shards(run.decode_mesh())
    pass_rows = workload.prefill_rows(run, work, shape, shards)
    # Outside of layers, decode loops over a segment's steps and prefill over its rows.
    trips = {"decode": shape.segment, "prefill": pass_rows}
    tokens = {"decode": shape.rows / shards, "prefill": pass_rows * shape.prompt_capacity}
    for name, lowered in lowered_programs(run, work, shape):
        log(f"compiling {name}")
        scopes = workload.layer_trips(run.model_config, tokens.get(name, 1), work.prompt_length)
        trip_count = trips_by_scope(scopes, otherwise=trips.get(name, 1))
        yield program_cost(name, lowered, trip_count, run.mesh.size)


def _show(line: str) -> None:
    """Show progress, which is no part of the result."""
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class PlanningTools:
    """What a plan is made with; tests bring their own parts, which compile nothing.

    Attributes:
        prepare_backend: Sets JAX up for a topology.
        find_topology: Returns the devices of a number of slices.
        train_cost: Compiles one update.
        sampler_costs: Compiles the sampler's programs.
        needed_mib: MiB of the train step on a device, to choose the rows of a microbatch by.
        log: Shows progress.
        clock: Time in seconds, which limits a search.
    """

    prepare_backend: Callable[[str], object] = topology.prepare_backend
    find_topology: Callable[[str, int], Topology] = topology.find_topology
    train_cost: Callable[[PlannedRun, Workload], Cost] = train_cost
    sampler_costs: Callable[[PlannedRun, Workload, CacheShape, Log], Iterable[Cost]] = sampler_costs
    needed_mib: Callable[[PlannedRun], float] = step_mib
    log: Log = _show
    clock: Callable[[], float] = time.monotonic
