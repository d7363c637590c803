"""A plan: the run's programs compiled, and what they say about memory and time together."""

import dataclasses
from collections.abc import Callable

from srft_jax.config import UsageError
from srft_jax.mesh import row_shards
from srft_jax.planning import memory, workload
from srft_jax.planning.estimate import estimate
from srft_jax.planning.hlo.count import Count
from srft_jax.planning.memory import ByPurpose, Held
from srft_jax.planning.phases import Phase, phase
from srft_jax.planning.program_costs import (
    OutOfMemory,
    ProgramCost,
    bytes_on_device,
    program_cost,
    trips_by_scope,
)
from srft_jax.planning.sampler_programs import (
    abstract_decode_params,
    abstract_sampler_state,
    lowered_sampler,
)
from srft_jax.planning.topology import Topology
from srft_jax.planning.train_program import lowered_train_step
from srft_jax.planning.workload import Workload, model_flops, workload_of
from srft_jax.rollout.cache import CacheShape
from srft_jax.rollout.sizes import SHARE_OF_LEFT
from srft_jax.setup.outline import Outline

Report = Callable[[str], None]  # a line of progress


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run on a topology.

    Attributes:
        run: As planned, which a search may have changed.
        topology: Devices, in the mesh's order.
        work: A step.
        phases: Of a step, those that compiled.
        memory: Of updates and rollouts, on a device.
        refused: Programs that do not fit.
        compiled: Programs that do; none where the plan is by arithmetic alone.
    """

    run: Outline
    topology: Topology
    work: Workload
    phases: tuple[Phase, ...]
    memory: dict[str, ByPurpose]
    refused: tuple[OutOfMemory, ...]
    compiled: tuple[ProgramCost, ...]

    @property
    def needed(self) -> float:
        """Bytes on a device, in the phase that holds the most."""
        of_phases = [sum(by_purpose.values()) for by_purpose in self.memory.values()]
        return max([*of_phases, *(one.needed or 0.0 for one in self.refused)])

    @property
    def fits(self) -> bool:
        return not self.refused and self.needed <= self.topology.chip.hbm

    @property
    def seconds(self) -> float:
        """Of a step, everything overlapping within a phase."""
        return sum(one.seconds for one in self.phases)

    @property
    def most_seconds(self) -> float:
        """Of a step, nothing overlapping."""
        return sum(one.most_seconds for one in self.phases)

    @property
    def train(self) -> Phase | None:
        return next((one for one in self.phases if one.name == "train"), None)

    @property
    def mfu(self) -> float | None:
        """Model's FLOPs of the updates over what the devices could do while they are made."""
        if self.train is None:
            return None
        peak = self.topology.chip.flops * len(self.topology.devices)
        return model_flops(self.run, self.work) / (self.train.seconds * peak)


def estimated_plan(run: Outline, topology: Topology) -> Plan:
    """The updates alone, by arithmetic; UsageError as `compiled_plan`."""
    run.decode_mesh()
    work = workload_of(run)
    found = estimate(run, work, topology, memory.held(run))
    train = Phase("train", Count(found.flops), found.compute, 0.0, found.exchange)
    ordered = topology.ordered(run.mesh)
    return Plan(run, ordered, work, (train,), {"updates": found.hbm}, (), ())


def compiled_plan(run: Outline, topology: Topology, report: Report) -> Plan:
    """Updates, and rollouts where the objective has any, from compiled programs.

    Raises:
        UsageError: of the mesh, rollouts and evaluations cannot make what `rollout.tensor` asks.
    """
    run.decode_mesh()  # before anything compiles
    plan = updates_plan(run, topology, report)
    if plan.refused or not plan.work.completions:
        return plan
    return _with_rollouts(plan, memory.held(run), report)


def updates_plan(run: Outline, topology: Topology, report: Report) -> Plan:
    """Of the train step alone."""
    topology, work, of_run = topology.ordered(run.mesh), workload_of(run), memory.held(run)
    report(f"compiling train for {topology.name}")
    train = train_account(run, work)
    by_purpose: dict[str, ByPurpose]
    if isinstance(train, OutOfMemory):
        by_purpose = {"updates": dataclasses.asdict(of_run)}
        return Plan(run, topology, work, (), by_purpose, (train,), ())
    updates = phase("train", train.count.times(work.updates), topology)
    by_purpose = {"updates": memory.of_updates(of_run, memory.batch_bytes(run), train)}
    return Plan(run, topology, work, (updates,), by_purpose, (), (train,))


def train_account(run: Outline, work: Workload) -> ProgramCost | OutOfMemory:
    """Of one update."""
    lowered = lowered_train_step(run.config, run.model_config, run.objective, run.mesh)
    return program_cost("train", lowered, workload.train_loops(run, work), run.mesh.size)


def _with_rollouts(plan: Plan, of_run: Held, report: Report) -> Plan:
    run, dtype = plan.run, plan.run.config.model.dtype
    decoding, params = run.decode_mesh(), memory.policy_params(run)
    copy = bytes_on_device(abstract_decode_params(params, run.model_config, decoding, dtype))
    left = plan.topology.chip.hbm - of_run.parameters - of_run.optimizer - copy
    try:
        shape = workload.cache_shape(run, plan.work, SHARE_OF_LEFT * left)
    except UsageError as error:  # as with any program, that it does not fit is an answer
        by_purpose = memory.of_rollouts(of_run, copy, 0.0, {})
        no_room = OutOfMemory("the sampler's cache", None, (str(error),))
        return _extended(plan, by_purpose, refused=(no_room,))
    found = _sampler_accounts(run, plan.work, shape, report)
    programs = {one.name: one for one in found if isinstance(one, ProgramCost)}
    refused = tuple(one for one in found if isinstance(one, OutOfMemory))
    state = abstract_sampler_state(run.model_config, shape, decoding, dtype)
    by_purpose = memory.of_rollouts(of_run, copy, bytes_on_device(state), programs)
    if "decode" in programs:
        of_own = bytes_on_device((state.cache.keys, state.cache.values))
        programs["decode"] = _as_the_cache_grows(programs["decode"], run, plan.work, shape, of_own)
    times = _times(run, plan.work, shape)
    rollouts = [
        phase(name, one.count.times(times[name]), plan.topology) for name, one in programs.items()
    ]
    plan = _extended(plan, by_purpose, refused)
    return dataclasses.replace(
        plan,
        phases=(*rollouts, *plan.phases),
        compiled=(*plan.compiled, *programs.values()),
    )


def _extended(plan: Plan, of_rollouts: ByPurpose, refused: tuple[OutOfMemory, ...]) -> Plan:
    return dataclasses.replace(
        plan, memory=plan.memory | {"rollouts": of_rollouts}, refused=refused
    )


def _sampler_accounts(
    run: Outline, work: Workload, shape: CacheShape, report: Report
) -> list[ProgramCost | OutOfMemory]:
    """Of each of the sampler's programs."""
    decoding = run.decode_mesh()
    shards = row_shards(decoding)
    pass_rows = workload.prefill_rows(work, shape, shards)
    otherwise = {"decode": shape.segment, "prefill": pass_rows}
    tokens = {"decode": shape.rows / shards, "prefill": pass_rows * shape.prompt_capacity}
    found = []
    for name, lowered in lowered_sampler(
        *(memory.policy_params(run), run.model_config, decoding, shape),
        sampling=run.sampling,
        pass_rows=pass_rows,
    ):
        report(f"compiling {name}")
        by_scope = workload.block_loops(run, tokens.get(name, 1), work.prompt_length)
        trips = trips_by_scope(by_scope, otherwise.get(name, 1))
        found.append(program_cost(name, lowered, trips, run.mesh.size))
    return found


def _as_the_cache_grows(
    decode: ProgramCost, run: Outline, work: Workload, shape: CacheShape, of_own: float
) -> ProgramCost:
    """Reading the cache of a mean segment in place of the largest, which was compiled.

    Args:
        decode: Of one segment.
        run: Lengths.
        work: Likewise.
        shape: The largest.
        of_own: Bytes of the rows' own keys and values, which each step reads once.
    """
    unused = 1 - workload.mean_capacity(run, work, shape) / shape.capacity
    read = max(0.0, decode.count.hbm_bytes - shape.segment * of_own * unused)
    return dataclasses.replace(decode, count=dataclasses.replace(decode.count, hbm_bytes=read))


def _times(run: Outline, work: Workload, shape: CacheShape) -> dict[str, float]:
    """How often a step runs each of the sampler's programs."""
    shards = row_shards(run.decode_mesh())
    of_pass = shards * workload.prefill_rows(work, shape, shards)
    return {
        "convert_layer": float(run.model_config.num_layers),
        "convert_rest": 1.0,
        "prefill": float(-(-work.prompts // of_pass)),
        "decode": workload.decode_steps(work, shape) / shape.segment,
    }
