"""The fastest mesh, microbatch and remat that fit: arithmetic sorts, the compiler decides."""

import dataclasses
import itertools
import time
from collections.abc import Iterator

from srft_jax.config import UsageError
from srft_jax.mesh import row_shards
from srft_jax.planning.estimate import Estimate, estimate
from srft_jax.planning.memory import held
from srft_jax.planning.phases import Phase, phase
from srft_jax.planning.planned_run import changed, planned_run
from srft_jax.planning.plans import Report, train_account
from srft_jax.planning.program_costs import OutOfMemory
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import workload_of
from srft_jax.setup.outline import Outline

_MOST_FITTING = 4
_ROWS_OF_A_SHARD = (1, 2, 4, 8)
_REMATS = ("none", "dots", "block")
# Arithmetic has been up to 9% off: the compiler may find that more fits, or that it does not.
_UNCERTAINTY = 1.1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run with other values for the keys of the search.

    Attributes:
        run: As changed.
        estimate: Of it.
        train: What its compiled train step takes in a step; None where it was not compiled.
        needed: Bytes by XLA, where it was.
    """

    run: Outline
    estimate: Estimate
    train: Phase | None = None
    needed: float | None = None

    @property
    def flags(self) -> str:
        """As a command line has them."""
        mesh, config = self.run.mesh.shape, self.run.config
        return (
            f"--mesh.data={mesh['data']} --mesh.fsdp={mesh['fsdp']} --mesh.tensor={mesh['tensor']} "
            f"--training.rows_per_microbatch={config.training.rows} "
            f"--model.remat={config.model.remat}"
        )


def search(run: Outline, topology: Topology, report: Report) -> list[Candidate]:
    """Candidates that were compiled and fit, the fastest first; of GPUs, the likeliest estimates.

    The context axis stays as configured.

    Raises:
        UsageError: no candidate that was compiled fits, not even the one that needs the least.
    """
    hbm = topology.chip.hbm
    candidates = sorted(_candidates(run, topology), key=_slowness)
    if not candidates:
        run.decode_mesh()  # says why: no mesh suits rollout.tensor
    likely = [one for one in candidates if one.estimate.needed < _UNCERTAINTY * hbm]
    report(f"search: {len(candidates)} candidates, {len(likely)} that may fit")
    if topology.chip.kind == "gpu":
        fitting = _by_arithmetic(candidates, hbm)
    else:
        least = min(candidates, key=lambda one: one.estimate.needed)
        fitting = _fitting(likely, least, topology, run.config.plan.search_seconds, report)
    if not fitting:
        raise UsageError(_nothing_fits(candidates, topology))
    return sorted(fitting, key=_time)


def _time(one: Candidate) -> tuple[float, float]:
    """Of several that are as fast if everything overlaps, the one that has less to overlap is."""
    found = one.train or one.estimate
    return found.seconds, found.exchange


def _slowness(one: Candidate) -> tuple[float, float]:
    """Where compute bounds several equally, the one with the most room comes first."""
    return one.estimate.seconds, one.estimate.needed


def _by_arithmetic(candidates: list[Candidate], hbm: float) -> list[Candidate]:
    """Those that fit whatever arithmetic is off by; where there is none, those that just fit."""
    roomy = [one for one in candidates if _UNCERTAINTY * one.estimate.needed < hbm]
    return roomy or [one for one in candidates if one.estimate.needed < hbm]


def _fitting(
    likely: list[Candidate], least: Candidate, topology: Topology, seconds: int, report: Report
) -> list[Candidate]:
    """Of the likely ones, the fastest first, those that do fit; else the one that needs least.

    Until no other is estimated to be faster than one that fits, or the seconds are over.
    """
    began, fitting, refused = time.monotonic(), list[Candidate](), list[Candidate]()
    for candidate in likely:
        over = time.monotonic() - began > seconds
        if over:
            report(f"search: plan.search_seconds = {seconds} are over")
        if over or len(fitting) == _MOST_FITTING or _is_slower(candidate, fitting):
            break
        if any(_holds_more(candidate, one) for one in refused):
            continue
        report(f"compiling train of {candidate.flags}")
        found = _compiled(candidate, topology)
        fitting += found
        refused += [] if found else [candidate]
    if not fitting and least not in refused:
        report(f"compiling train of {least.flags}, which needs the least")
        fitting += _compiled(least, topology)
    return fitting


def _is_slower(candidate: Candidate, fitting: list[Candidate]) -> bool:
    """By arithmetic than one that was compiled."""
    return any(one.train and one.train.seconds <= candidate.estimate.seconds for one in fitting)


def _holds_more(candidate: Candidate, other: Candidate) -> bool:
    """As much of everything, on the same mesh."""
    mine, others = candidate.run.config, other.run.config
    return (
        candidate.run.mesh.shape == other.run.mesh.shape
        and mine.training.rows >= others.training.rows
        and _REMATS.index(mine.model.remat) <= _REMATS.index(others.model.remat)
    )


def _compiled(candidate: Candidate, topology: Topology) -> list[Candidate]:
    """The candidate with what XLA says of it, or none if it does not fit."""
    work = workload_of(candidate.run)
    found = train_account(candidate.run, work)
    if isinstance(found, OutOfMemory) or found.needed > topology.chip.hbm:
        return []
    of_step = found.count.times(work.updates)
    train = phase("train", of_step, topology.ordered(candidate.run.mesh))
    return [dataclasses.replace(candidate, train=train, needed=found.needed)]


def _candidates(run: Outline, topology: Topology) -> Iterator[Candidate]:
    for of_mesh in _meshes(run, topology):
        of_run, shards = held(of_mesh), row_shards(of_mesh.mesh) // of_mesh.mesh.shape["context"]
        for rows, remat in itertools.product(_ROWS_OF_A_SHARD, _REMATS):
            config = changed(
                of_mesh.config,
                training={"rows_per_microbatch": rows * shards},
                model={"remat": remat},
            )
            one = dataclasses.replace(of_mesh, config=config)
            yield Candidate(one, estimate(one, workload_of(one), topology, of_run))


def _meshes(run: Outline, topology: Topology) -> Iterator[Outline]:
    """The run on every mesh that rollouts can be laid out on, whose axis `tensor` splits whole
    heads, and `data` spans the slices."""
    size, context = run.mesh.size, run.mesh.shape["context"]
    for fsdp, tensor in itertools.product(_divisors(size), repeat=2):
        data, rest = divmod(size, fsdp * tensor * context)
        if rest or data % run.config.mesh.slices or run.model_config.num_heads % tensor:
            continue
        config = changed(
            run.config,
            mesh={"data": data, "fsdp": fsdp, "tensor": tensor},
            training={"rows_per_microbatch": data * fsdp},
        )
        of_mesh = planned_run(config, topology.devices)
        if _can_decode(of_mesh):
            yield of_mesh


def _can_decode(run: Outline) -> bool:
    try:
        run.decode_mesh()
    except UsageError:  # a copy of the parameters over several processes
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _nothing_fits(candidates: list[Candidate], topology: Topology) -> str:
    least = min(candidates, key=lambda one: one.estimate.needed)
    largest = sorted(least.estimate.hbm.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{name} {size / 2**30:.3g} GiB" for name, size in largest)
    return (
        f"no mesh, microbatch and remat fits {topology.name}, whose devices have "
        f"{topology.chip.hbm / 2**30:.4g} GiB; the least by estimate, {least.flags}, takes "
        f"{least.estimate.needed / 2**30:.3g} GiB: {listed}"
    )
