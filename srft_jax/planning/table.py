"""A plan in plain text, and as one line of JSON."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from srft_jax.models import families
from srft_jax.planning.chips import GIB
from srft_jax.planning.phases import Phase
from srft_jax.planning.plans import Plan
from srft_jax.planning.search import Candidate
from srft_jax.planning.workload import model_flops
from srft_jax.report.terminal import table

_MOST_SHOWN = 5


def plan_text(plan: Plan) -> str:
    """All that is known, in parts."""
    parts = [_what(plan), _memory(plan), _verdict(plan)]
    if plan.compiled:
        parts += [_phases(plan), _exchanged(plan)]
    if plan.phases:
        parts.append(_step(plan))
    return "\n\n".join(parts)


def _what(plan: Plan) -> str:
    run, work, chip = plan.run, plan.work, plan.topology.chip
    training = run.config.training
    rows = families.parameters(run.model_config)
    size = sum(math.prod(families.stacked_shape(row, run.model_config)) for row in rows)
    of_cores = ", each a core of a chip" if chip.cores > 1 else ""
    mesh = " x ".join(f"{axis} {number}" for axis, number in run.mesh.shape.items())
    cells = [
        ["devices", f"{len(plan.topology.devices)}{of_cores}: {mesh}"],
        ["parameters", f"{size:,}"],
        ["objective", run.config.objective.preset],
        ["lengths", f"prompt {work.prompt_length:,}, completion {work.completion_length:,}"],
        ["rollout", f"{work.completions:,} completions of {work.prompts:,} prompts"],
        ["updates", f"{work.updates} of {work.sequences:,} sequences"],
        [
            "microbatches",
            f"{work.microbatches} of {training.rows} x {training.row_length:,} "
            f"tokens, remat {run.config.model.remat}",
        ],
    ]
    several = f"{plan.topology.slices} x " if plan.topology.slices > 1 else ""
    return table([f"plan for {several}{plan.topology.name}", ""], cells)


def _memory(plan: Plan) -> str:
    """GiB on a device."""
    purposes = list(dict.fromkeys(name for of in plan.memory.values() for name in of))
    cells = [[name, *(_gib(of.get(name)) for of in plan.memory.values())] for name in purposes] + [
        ["all together", *(_gib(sum(of.values())) for of in plan.memory.values())]
    ]
    return table(["GiB on a device", *plan.memory], cells)


def _gib(size: float | None) -> str:
    return "0.00" if size is None else f"{size / GIB:.2f}"


def _verdict(plan: Plan) -> str:
    has = f"{plan.topology.chip.hbm / GIB:.2f} GiB"
    if plan.fits:
        what = "" if plan.compiled else " (the updates alone)"
        return f"fits: yes{what}, {plan.needed / GIB:.2f} of {has}"
    lines = [f"fits: no, {plan.needed / GIB:.2f} GiB are needed where a device has {has}"]
    for refused in plan.refused:
        lines.append(f"  there is no room for {refused.name}" + ":" * bool(refused.largest))
        lines += [f"    {buffer}" for buffer in refused.largest]
    lines.append("  largest by purpose: " + ", ".join(_largest(plan)))
    lines.append("  see --search, or docs/plan.md for what makes it smaller")
    return "\n".join(lines)


def _largest(plan: Plan) -> Iterator[str]:
    of_peak = max(plan.memory.values(), key=lambda of: sum(of.values()))
    named = sum(of_peak.values())
    rest = {"activations and temporaries": plan.needed - named} if plan.needed > named else {}
    ordered = sorted((of_peak | rest).items(), key=lambda item: -item[1])
    return (f"{name} {size / GIB:.2f} GiB" for name, size in ordered[:_MOST_SHOWN])


def _phases(plan: Plan) -> str:
    """Of one step, on a device."""
    cells = [
        [
            one.name,
            f"{one.count.flops / 1e12:.4g}",
            f"{one.count.hbm_bytes / 1e9:.4g}",
            f"{sum(one.count.collectives.values()) / 1e9:.4g}",
            *(f"{time:.4g}" for time in (one.compute, one.memory, one.exchange)),
            one.bound,
        ]
        for one in plan.phases
    ]
    headers = ["phase", "TFLOP", "HBM GB", "sent GB", "compute s", "HBM s", "links s", "bound by"]
    return table(headers, cells)


def _exchanged(plan: Plan) -> str:
    cells = [
        [one.name, kind, f"{size}", f"{sent / 1e9:.4g}"]
        for one in plan.phases
        for (kind, size), sent in _by_kind(one).most_common()
    ]
    cells += [
        [one.name, "to other slices", f"{plan.topology.slices}", f"{one.to_slices / 1e9:.4g}"]
        for one in plan.phases
        if one.to_slices
    ]
    if not cells:
        return "no device sends anything"
    return table(["phase", "collective", "among", "sent GB"], cells)


def _by_kind(one: Phase) -> Counter[tuple[str, int]]:
    """Bytes sent by kind and number of devices in a group."""
    found: Counter[tuple[str, int]] = Counter()
    for (kind, group), sent in one.count.collectives.items():
        found[kind, len(group)] += sent
    return found


def _step(plan: Plan) -> str:
    """What a step comes to."""
    what = "step" if plan.compiled else "updates of a step"
    cells = [
        [f"{what}, all overlapping", f"{plan.seconds:.4g} s"],
        [f"{what}, nothing overlapping", f"{plan.most_seconds:.4g} s"],
        ["trained tokens a second", f"{plan.work.trained_tokens / plan.seconds:,.0f}"],
        ["MFU of the updates", f"{plan.mfu or 0.0:.1%}"],
    ]
    if plan.compiled and plan.train:
        flops = plan.train.count.flops * len(plan.topology.devices)
        ratio = flops / model_flops(plan.run, plan.work)
        cells.append(["FLOPs over 6ND + attention", f"{ratio:.3f}"])
    return table(["at the rates of the table of chips", ""], cells)


def search_text(candidates: Sequence[Candidate]) -> str:
    """The best, the fastest first."""
    cells = [
        [
            one.flags,
            f"{(one.train or one.estimate).seconds:.4g}",
            f"{(one.needed or one.estimate.needed) / GIB:.2f}",
        ]
        for one in candidates[:_MOST_SHOWN]
    ]
    return table(["found by --search", "train s", "GiB"], cells)


def scaling_text(plans: Mapping[int, Plan]) -> str:
    """Of the updates, as chips are added and every device keeps its rows."""
    cells = []
    for chips, plan in plans.items():
        if plan.train is None:
            cells.append([chips, "-", "-", "-", "-", f"{plan.needed / GIB:.2f}", "no"])
            continue
        train = plan.train
        cells.append(
            [
                chips,
                f"{train.count.flops / 1e12:.4g}",
                f"{train.count.hbm_bytes / 1e9:.4g}",
                f"{sum(train.count.collectives.values()) / 1e9:.4g}",
                f"{train.seconds:.4g}",
                f"{plan.needed / GIB:.2f}",
                "yes" if plan.fits else "no",
            ]
        )
    return table(["chips", "TFLOP", "HBM GB", "sent GB", "train s", "GiB", "fits"], cells)


def plan_json(plan: Plan, scaling: Mapping[int, Plan]) -> dict[str, Any]:
    """Bytes and FLOPs of one device, seconds of one step."""
    of_phases = {one.name: one for one in plan.phases}
    found: dict[str, Any] = {
        "topology": plan.topology.name,
        "counted": bool(plan.compiled),
        "fits": plan.fits,
        "hbm_bytes_per_device": plan.needed,
        "hbm_bytes_of_device": plan.topology.chip.hbm,
        "hbm_by_purpose": {phase: dict(of) for phase, of in plan.memory.items()},
        "flops_per_device": {name: one.count.flops for name, one in of_phases.items()},
        "hbm_traffic": {name: one.count.hbm_bytes for name, one in of_phases.items()},
        "collective_bytes": {
            name: {f"{kind} of {size}": sent for (kind, size), sent in _by_kind(one).items()}
            for name, one in of_phases.items()
        },
        "bytes_to_other_slices": {name: one.to_slices for name, one in of_phases.items()},
        "seconds": {
            name: {"compute": one.compute, "hbm": one.memory, "links": one.exchange}
            for name, one in of_phases.items()
        },
        "step_seconds": plan.seconds if plan.phases else None,
        "mfu": plan.mfu,
        "model_flops_per_device": model_flops(plan.run, plan.work) / len(plan.topology.devices),
        "tokens_per_second": plan.work.trained_tokens / plan.seconds if plan.phases else None,
        "compile_seconds": {one.name: one.compile_seconds for one in plan.compiled},
    }
    if scaling:
        found["scaling"] = {chips: plan_json(one, {}) for chips, one in scaling.items()}
    return found
