"""A plan: a run's programs compiled, and what they say together about memory and time."""

import dataclasses

from srft_jax.config import UsageError
from srft_jax.mesh import row_shards
from srft_jax.planning import workload
from srft_jax.planning.estimate import estimate_updates
from srft_jax.planning.hlo.count import Count
from srft_jax.planning.memory import (
    ByPurpose,
    batch_bytes,
    memory_in_rollouts,
    memory_in_updates,
    policy_params,
    resident_bytes,
)
from srft_jax.planning.phases import Phase, make_phase
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.program_costs import OutOfMemory, ProgramCost, bytes_on_device
from srft_jax.planning.sampler_programs import abstract_decode_params, abstract_sampler_state
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import Workload, make_workload, model_flops
from srft_jax.rollout.cache import CacheShape
from srft_jax.rollout.sizes import SHARE_OF_LEFT


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run on a topology.

    Attributes:
        run: The run, as a search may have changed it.
        topology: Devices, in the mesh's order.
        work: Numbers of one step.
        phases: Phases of one step that could be compiled.
        memory: Bytes on a device by purpose, in "updates" and "rollouts".
        refused: Programs that do not fit.
        compiled: Programs that fit; none in a plan by arithmetic alone.
    """

    run: PlannedRun
    topology: Topology
    work: Workload
    phases: tuple[Phase, ...]
    memory: dict[str, ByPurpose]
    refused: tuple[OutOfMemory, ...]
    compiled: tuple[ProgramCost, ...]

    @property
    def needed(self) -> float:
        """Bytes that a device needs, in the phase that needs the most."""
        held = [sum(by_purpose.values()) for by_purpose in self.memory.values()]
        return max([*held, *(program.needed or 0.0 for program in self.refused)])

    @property
    def fits(self) -> bool:
        """Every program compiles, and a device holds the largest phase."""
        return not self.refused and self.needed <= self.topology.chip.hbm

    @property
    def seconds(self) -> float:
        """Seconds of a step if everything overlaps within each phase."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def most_seconds(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return sum(phase.most_seconds for phase in self.phases)

    @property
    def train(self) -> Phase | None:
        """The updates; None if they do not fit."""
        return next((phase for phase in self.phases if phase.name == "train"), None)

    @property
    def model_flops(self) -> float:
        """FLOPs of the updates, over all devices, that no implementation can avoid."""
        return model_flops(self.run.model_config, self.work)

    @property
    def mfu(self) -> float | None:
        """The model's FLOPs over what the devices could do while the updates are made."""
        if self.train is None:
            return None
        peak = self.topology.chip.flops * len(self.topology.devices)
        return self.model_flops / (self.train.seconds * peak)


def estimate_plan(run: PlannedRun, topology: Topology) -> Plan:
    """Plan the updates alone, by arithmetic.

    Raises:
        UsageError: see `compile_plan`.
    """
    run.decode_mesh()
    work = make_workload(run)
    estimate = estimate_updates(run, work, topology, resident_bytes(run))
    train = Phase(
        name="train",
        count=Count(estimate.flops),
        compute=estimate.compute,
        memory=0.0,  # not estimated
        exchange=estimate.exchange,
    )
    return Plan(
        run=run,
        topology=topology.ordered(run.mesh),
        work=work,
        phases=(train,),
        memory={"updates": estimate.hbm},
        refused=(),
        compiled=(),
    )


def compile_plan(run: PlannedRun, topology: Topology, tools: PlanningTools) -> Plan:
    """Plan updates, and rollouts if the objective has any, from compiled programs.

    Raises:
        UsageError: rollouts and evaluations cannot use the mesh as `rollout.tensor` asks.
    """
    run.decode_mesh()  # raises before anything compiles
    plan = compile_updates_plan(run, topology, tools)
    if plan.refused or not plan.work.completions:
        return plan
    return add_rollouts(plan, tools)


def compile_updates_plan(run: PlannedRun, topology: Topology, tools: PlanningTools) -> Plan:
    """Plan the updates alone, from the compiled train step."""
    topology, work, resident = topology.ordered(run.mesh), make_workload(run), resident_bytes(run)
    tools.log(f"compiling train for {topology.name}")
    train = tools.train_cost(run, work)
    updates_alone = Plan(
        run=run,
        topology=topology,
        work=work,
        phases=(),
        memory={
            "updates": {
                "parameters": resident.parameters,
                "optimizer": resident.optimizer,
                "gradients": resident.gradients,
            }
        },
        refused=(),
        compiled=(),
    )
    if isinstance(train, OutOfMemory):
        return dataclasses.replace(updates_alone, refused=(train,))
    return dataclasses.replace(
        updates_alone,
        phases=(make_phase("train", train.count.times(work.updates), topology),),
        memory={"updates": memory_in_updates(resident, batch_bytes(run), train)},
        compiled=(train,),
    )


def add_rollouts(plan: Plan, tools: PlanningTools) -> Plan:
    """Return the plan of the updates with rollouts added."""
    run, work, dtype = plan.run, plan.work, plan.run.sampling.dtype
    resident, decoding = resident_bytes(run), run.decode_mesh()
    params = abstract_decode_params(policy_params(run), run.model_config, decoding, dtype)
    copy = bytes_on_device(params)
    left = plan.topology.chip.hbm - resident.parameters - resident.optimizer - copy
    try:
        shape = workload.cache_shape(run, work, SHARE_OF_LEFT * left)
    except UsageError as error:  # that there is no room is an answer
        memory = plan.memory | {"rollouts": memory_in_rollouts(resident, copy, 0.0, [])}
        no_room = OutOfMemory("the sampler's cache", needed=None, largest=(str(error),))
        return dataclasses.replace(plan, memory=memory, refused=(no_room,))
    costs = list(tools.sampler_costs(run, work, shape, tools.log))
    programs = {cost.name: cost for cost in costs if isinstance(cost, ProgramCost)}
    state = abstract_sampler_state(run.model_config, shape, decoding, dtype)
    held = memory_in_rollouts(resident, copy, bytes_on_device(state), programs.values())
    if "decode" in programs:
        own_cache = bytes_on_device((state.cache.keys, state.cache.values))
        unused = 1 - workload.mean_capacity(run, work, shape) / shape.capacity
        programs["decode"] = with_smaller_cache(
            programs["decode"], shape.segment * own_cache * unused
        )
    times = _runs_per_step(run, work, shape)
    rollouts = [
        make_phase(name, program.count.times(times[name]), plan.topology)
        for name, program in programs.items()
    ]
    return dataclasses.replace(
        plan,
        phases=(*rollouts, *plan.phases),
        memory=plan.memory | {"rollouts": held},
        refused=tuple(cost for cost in costs if isinstance(cost, OutOfMemory)),
        compiled=(*plan.compiled, *programs.values()),
    )


def with_smaller_cache(decode: ProgramCost, unread: float) -> ProgramCost:
    """Return decode's cost for a mean segment: it was compiled for the largest cache.

    Args:
        decode: Cost of one segment.
        unread: Bytes of the largest cache that a mean segment does not read.
    """
    count = decode.count
    read = max(0.0, count.hbm_bytes - unread)
    return dataclasses.replace(decode, count=dataclasses.replace(count, hbm_bytes=read))


def _runs_per_step(run: PlannedRun, work: Workload, shape: CacheShape) -> dict[str, float]:
    """Return how often a step runs each of the sampler's programs."""
    shards = row_shards(run.decode_mesh())
    return {
        "convert_layer": float(run.model_config.num_layers),
        "convert_rest": 1.0,
        "prefill": float(workload.num_prefills(run, work, shape, shards)),
        "decode": workload.decode_steps(work, shape) / shape.segment,
    }
