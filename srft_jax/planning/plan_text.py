"""A plan in plain text, and as what one line of JSON holds."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from srft_jax.models import families
from srft_jax.planning.chips import GIB
from srft_jax.planning.phases import Phase
from srft_jax.planning.plans import Plan
from srft_jax.planning.search import Candidate
from srft_jax.report.terminal import table

_MOST_SHOWN = 5


def format_plan(plan: Plan) -> str:
    """Return tables of all that the plan knows."""
    parts = [_format_run(plan), _format_memory(plan), _format_verdict(plan)]
    if plan.compiled:
        parts += [_format_phases(plan), _format_collectives(plan)]
    if plan.phases:
        parts.append(_format_step(plan))
    return "\n\n".join(parts)


def _format_run(plan: Plan) -> str:
    run, work, chip = plan.run, plan.work, plan.topology.chip
    size = sum(
        math.prod(families.stacked_shape(parameter, run.model_config))
        for parameter in families.parameters(run.model_config)
    )
    cores = ", each a core of a chip" if chip.cores > 1 else ""
    mesh = " x ".join(f"{axis} {number}" for axis, number in run.mesh.shape.items())
    cells = [
        ["devices", f"{len(plan.topology.devices)}{cores}: {mesh}"],
        ["parameters", f"{size:,}"],
        ["objective", run.preset],
        ["lengths", f"prompt {work.prompt_length:,}, completion {work.completion_length:,}"],
        ["rollout", f"{work.completions:,} completions of {work.prompts:,} prompts"],
        ["updates", f"{work.updates} of {work.sequences:,} sequences"],
        [
            "microbatches",
            f"{work.microbatches} of {run.training.rows} x {run.training.row_length:,} "
            f"tokens, remat {run.forward.runtime.remat}",
        ],
    ]
    several = f"{plan.topology.slices} x " if plan.topology.slices > 1 else ""
    return table([f"plan for {several}{plan.topology.name}", ""], cells)


def _format_memory(plan: Plan) -> str:
    columns = plan.memory.values()
    purposes = list(dict.fromkeys(name for column in columns for name in column))
    cells = [[name, *(_gib(column.get(name)) for column in columns)] for name in purposes]
    cells.append(["all together", *(_gib(sum(column.values())) for column in columns)])
    return table(["GiB on a device", *plan.memory], cells)


def _gib(size: float | None) -> str:
    return "0.00" if size is None else f"{size / GIB:.2f}"


def _format_verdict(plan: Plan) -> str:
    there_is = f"{plan.topology.chip.hbm / GIB:.2f} GiB"
    if plan.fits:
        what = "" if plan.compiled else " (the updates alone)"
        return f"fits: yes{what}, {plan.needed / GIB:.2f} of {there_is}"
    lines = [f"fits: no, {plan.needed / GIB:.2f} GiB are needed where a device has {there_is}"]
    for refused in plan.refused:
        lines.append(f"  there is no room for {refused.name}" + ":" * bool(refused.largest))
        lines += [f"    {buffer}" for buffer in refused.largest]
    lines.append("  largest by purpose: " + ", ".join(_largest(plan)))
    lines.append("  see --search, or docs/plan.md for what makes it smaller")
    return "\n".join(lines)


def _largest(plan: Plan) -> Iterator[str]:
    """Yield what takes the most in the phase that holds the most."""
    peak = max(plan.memory.values(), key=lambda by_purpose: sum(by_purpose.values()))
    named = sum(peak.values())
    rest = {"activations and temporaries": plan.needed - named} if plan.needed > named else {}
    ordered = sorted((peak | rest).items(), key=lambda item: -item[1])
    return (f"{name} {size / GIB:.2f} GiB" for name, size in ordered[:_MOST_SHOWN])


def _format_phases(plan: Plan) -> str:
    """Return the work and time of each phase in one step, on a device."""
    cells = [
        [
            phase.name,
            f"{phase.count.flops / 1e12:.4g}",
            f"{phase.count.hbm_bytes / 1e9:.4g}",
            f"{sum(phase.count.collectives.values()) / 1e9:.4g}",
            *(f"{time:.4g}" for time in (phase.compute, phase.memory, phase.exchange)),
            phase.bound,
        ]
        for phase in plan.phases
    ]
    headers = ["phase", "TFLOP", "HBM GB", "sent GB", "compute s", "HBM s", "links s", "bound by"]
    return table(headers, cells)


def _format_collectives(plan: Plan) -> str:
    cells = [
        [phase.name, kind, f"{size}", f"{sent / 1e9:.4g}"]
        for phase in plan.phases
        for (kind, size), sent in _sent_by_kind(phase).most_common()
    ]
    cells += [
        [phase.name, "to other slices", f"{plan.topology.slices}", f"{phase.to_slices / 1e9:.4g}"]
        for phase in plan.phases
        if phase.to_slices
    ]
    if not cells:
        return "no device sends anything"
    return table(["phase", "collective", "among", "sent GB"], cells)


def _sent_by_kind(phase: Phase) -> Counter[tuple[str, int]]:
    """Return the bytes sent by kind of collective and size of a group."""
    sent_by_kind: Counter[tuple[str, int]] = Counter()
    for (kind, group), sent in phase.count.collectives.items():
        sent_by_kind[kind, len(group)] += sent
    return sent_by_kind


def _format_step(plan: Plan) -> str:
    what = "step" if plan.compiled else "updates of a step"
    cells = [
        [f"{what}, all overlapping", f"{plan.seconds:.4g} s"],
        [f"{what}, nothing overlapping", f"{plan.most_seconds:.4g} s"],
        ["trained tokens a second", f"{plan.work.trained_tokens / plan.seconds:,.0f}"],
        ["MFU of the updates", f"{plan.mfu or 0.0:.1%}"],
    ]
    if plan.compiled and plan.train:
        flops = plan.train.count.flops * len(plan.topology.devices)
        cells.append(["FLOPs over 6ND + attention", f"{flops / plan.model_flops:.3f}"])
    return table(["at the rates of the table of chips", ""], cells)


def format_search(candidates: Sequence[Candidate]) -> str:
    """Return a table of the first candidates."""
    cells = [
        [
            candidate.flags,
            f"{(candidate.train or candidate.estimate).seconds:.4g}",
            _gib(candidate.needed or candidate.estimate.needed),
        ]
        for candidate in candidates[:_MOST_SHOWN]
    ]
    return table(["found by --search", "train s", "GiB"], cells)


def format_scaling(plans: Mapping[int, Plan]) -> str:
    """Return a table of the updates by number of chips, where every device keeps its rows."""
    cells = []
    for chips, plan in plans.items():
        work = ["-"] * 4
        if plan.train is not None:
            count = plan.train.count
            sent = sum(count.collectives.values())
            figures = (count.flops / 1e12, count.hbm_bytes / 1e9, sent / 1e9, plan.train.seconds)
            work = [f"{figure:.4g}" for figure in figures]
        cells.append([chips, *work, _gib(plan.needed), "yes" if plan.fits else "no"])
    return table(["chips", "TFLOP", "HBM GB", "sent GB", "train s", "GiB", "fits"], cells)


def plan_as_json(plan: Plan, scaling: Mapping[int, Plan]) -> dict[str, Any]:
    """Return bytes and FLOPs of one device and seconds of one step, by name."""
    phases = {phase.name: phase for phase in plan.phases}
    figures: dict[str, Any] = {
        "topology": plan.topology.name,
        "counted": bool(plan.compiled),
        "fits": plan.fits,
        "hbm_bytes_per_device": plan.needed,
        "hbm_bytes_of_device": plan.topology.chip.hbm,
        "hbm_by_purpose": {phase: dict(held) for phase, held in plan.memory.items()},
        "flops_per_device": {name: phase.count.flops for name, phase in phases.items()},
        "hbm_traffic": {name: phase.count.hbm_bytes for name, phase in phases.items()},
        "collective_bytes": {
            name: {f"{kind} of {size}": sent for (kind, size), sent in _sent_by_kind(phase).items()}
            for name, phase in phases.items()
        },
        "bytes_to_other_slices": {name: phase.to_slices for name, phase in phases.items()},
        "seconds": {
            name: {"compute": phase.compute, "hbm": phase.memory, "links": phase.exchange}
            for name, phase in phases.items()
        },
        "step_seconds": plan.seconds if plan.phases else None,
        "mfu": plan.mfu,
        "model_flops_per_device": plan.model_flops / len(plan.topology.devices),
        "tokens_per_second": plan.work.trained_tokens / plan.seconds if plan.phases else None,
        "compile_seconds": {program.name: program.compile_seconds for program in plan.compiled},
    }
    if scaling:
        figures["scaling"] = {chips: plan_as_json(other, {}) for chips, other in scaling.items()}
    return figures
