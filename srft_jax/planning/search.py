"""The fastest mesh, microbatch and remat that fit: arithmetic sorts, the compiler decides."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from srft_jax.config import MeshConfig, UsageError
from srft_jax.planning.estimate import Estimate, estimate_updates
from srft_jax.planning.memory import resident_bytes
from srft_jax.planning.phases import Phase, make_phase
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.program_costs import OutOfMemory
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import make_workload

_MOST_FITTING = 4
_ROWS_PER_SHARD = (1, 2, 4, 8)
# From the most memory to the least.
_REMATS: tuple[Literal["none", "dots", "block"], ...] = ("none", "dots", "block")
# Arithmetic has been up to 9% off: a candidate may fit that it rejects, and the other way round.
_UNCERTAINTY = 1.1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run with other values for the keys of the search.

    Attributes:
        run: The changed run.
        estimate: Its updates by arithmetic.
        train: Its compiled train step in one step of the run; None if it was not compiled.
        needed: Bytes on a device by XLA, if it was compiled.
    """

    run: PlannedRun
    estimate: Estimate
    train: Phase | None = None
    needed: float | None = None

    @property
    def flags(self) -> str:
        """The changed keys as a command line has them."""
        mesh = self.run.mesh.shape
        return (
            f"--mesh.data={mesh['data']} --mesh.fsdp={mesh['fsdp']} --mesh.tensor={mesh['tensor']} "
            f"--training.rows_per_microbatch={self.run.training.rows} "
            f"--model.remat={self.run.forward.runtime.remat}"
        )


def search(
    run: PlannedRun, topology: Topology, tools: PlanningTools, *, seconds: int
) -> list[Candidate]:
    """Return candidates that were compiled and fit, the fastest first; for GPUs, by estimate.

    Args:
        run: Run to change; its context axis stays.
        topology: Devices.
        tools: What compiles a candidate's train step, and the clock.
        seconds: Time after which no further candidate is compiled.

    Raises:
        UsageError: no candidate that was compiled fits, not even the one that needs the least.
    """
    hbm = topology.chip.hbm
    # If compute bounds several alike, the one with the most room comes first.
    candidates = sorted(
        make_candidates(run, topology),
        key=lambda candidate: (candidate.estimate.seconds, candidate.estimate.needed),
    )
    if not candidates:
        run.decode_mesh()  # says why: no mesh suits rollout.tensor
    most = _UNCERTAINTY * hbm
    likely = [candidate for candidate in candidates if candidate.estimate.needed < most]
    tools.log(f"search: {len(candidates)} candidates, {len(likely)} that may fit")
    if topology.chip.kind == "gpu":
        fitting = fit_by_arithmetic(candidates, hbm)
    else:
        fitting = _fit_by_compiling(candidates, likely, topology, tools, seconds)
    if not fitting:
        raise UsageError(_nothing_fits(candidates, topology))
    return fastest_first(fitting)


def fastest_first(candidates: list[Candidate]) -> list[Candidate]:
    """Sort candidates; of equally fast ones the one with less to overlap comes first."""

    def speed(candidate: Candidate) -> tuple[float, float]:
        times = candidate.train or candidate.estimate
        return times.seconds, times.exchange

    return sorted(candidates, key=speed)


def fit_by_arithmetic(candidates: list[Candidate], hbm: float) -> list[Candidate]:
    """Return candidates that fit despite the error of arithmetic; if none, those that just fit."""
    needed = [(candidate, candidate.estimate.needed) for candidate in candidates]
    roomy = [candidate for candidate, size in needed if _UNCERTAINTY * size < hbm]
    return roomy or [candidate for candidate, size in needed if size < hbm]


def _compiled(
    candidate: Candidate, topology: Topology, tools: PlanningTools, note: str = ""
) -> Candidate | None:
    """Return the candidate with what XLA says of it; None if it does not fit."""
    tools.log(f"compiling train of {candidate.flags}{note}")
    work = make_workload(candidate.run)
    cost = tools.train_cost(candidate.run, work)
    if isinstance(cost, OutOfMemory) or cost.needed > topology.chip.hbm:
        return None
    ordered = topology.ordered(candidate.run.mesh)
    train = make_phase("train", cost.count.times(work.updates), ordered)
    return dataclasses.replace(candidate, train=train, needed=cost.needed)


def _fit_by_compiling(
    candidates: list[Candidate],
    likely: list[Candidate],
    topology: Topology,
    tools: PlanningTools,
    seconds: int,
) -> list[Candidate]:
    """Return those of the likely candidates that do fit; if none, the one that needs the least."""
    began, fitting, refused = tools.clock(), list[Candidate](), list[Candidate]()
    for candidate in likely:
        if tools.clock() - began > seconds:
            tools.log(f"search: plan.search_seconds = {seconds} are over")
            break
        # Enough to choose from, or those that follow are estimated to be slower than one that fits.
        if len(fitting) == _MOST_FITTING or _is_slower(candidate, fitting):
            break
        # It needs more memory than one that had too little.
        if any(_holds_more(candidate, other) for other in refused):
            continue
        if compiled := _compiled(candidate, topology, tools):
            fitting.append(compiled)
        else:
            refused.append(candidate)
    least = min(candidates, key=lambda candidate: candidate.estimate.needed)
    if not fitting and least not in refused:
        note = ", which needs the least"
        fitting += filter(None, [_compiled(least, topology, tools, note)])
    return fitting


def _is_slower(candidate: Candidate, fitting: list[Candidate]) -> bool:
    """Return whether a candidate is estimated to be slower than one that was compiled."""
    estimated = candidate.estimate.seconds
    return any(other.train and other.train.seconds <= estimated for other in fitting)


def _holds_more(candidate: Candidate, other: Candidate) -> bool:
    """Return whether a candidate holds at least as much of everything, on the same mesh."""
    run, others = candidate.run, other.run
    return (
        run.mesh.shape == others.mesh.shape
        and run.training.rows >= others.training.rows
        and _REMATS.index(run.forward.runtime.remat) <= _REMATS.index(others.forward.runtime.remat)
    )


def make_candidates(run: PlannedRun, topology: Topology) -> Iterator[Candidate]:
    """Yield the run with each mesh, number of rows and remat that a search considers."""
    for on_mesh in runs_on_meshes(run, topology):
        resident = resident_bytes(on_mesh)  # the same for all rows and remats
        for rows, remat in itertools.product(_ROWS_PER_SHARD, _REMATS):
            changed = on_mesh.with_rows(rows * on_mesh.data_shards).with_remat(remat)
            estimate = estimate_updates(changed, make_workload(changed), topology, resident)
            yield Candidate(changed, estimate)


def runs_on_meshes(run: PlannedRun, topology: Topology) -> Iterator[PlannedRun]:
    """Yield the run on every mesh whose axis `tensor` splits whole heads, whose `data` spans the
    slices, and that rollouts can use."""
    size, context = run.mesh.size, run.mesh.shape["context"]
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    for fsdp, tensor in itertools.product(divisors, repeat=2):
        data, rest = divmod(size, fsdp * tensor * context)
        if rest or data % topology.slices or run.model_config.num_heads % tensor:
            continue
        sizes = MeshConfig(
            data=data, fsdp=fsdp, context=context, tensor=tensor, slices=topology.slices
        )
        on_mesh = run.on_mesh(sizes, topology.devices, rows_per_shard=1)
        try:
            on_mesh.decode_mesh()
        except UsageError:  # a copy of the parameters would span several processes
            continue
        yield on_mesh


def _nothing_fits(candidates: list[Candidate], topology: Topology) -> str:
    least = min(candidates, key=lambda candidate: candidate.estimate.needed)
    largest = sorted(least.estimate.hbm.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{name} {size / 2**30:.3g} GiB" for name, size in largest)
    return (
        f"no mesh, microbatch and remat fits {topology.name}, whose devices have "
        f"{topology.chip.hbm / 2**30:.4g} GiB; the least by estimate, {least.flags}, takes "
        f"{least.estimate.needed / 2**30:.3g} GiB: {listed}"
    )
