"""The same run on 8 to 256 chips of one kind: `data` grows, and each device keeps its rows."""

import dataclasses

from srft_jax.config import MeshConfig, UsageError
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.plans import Plan, compile_updates_plan
from srft_jax.planning.topology import Topology

_CHIPS = (8, 16, 32, 64, 128, 256)


def plan_scaling(run: PlannedRun, topology: Topology, tools: PlanningTools) -> dict[int, Plan]:
    """Return plans of the updates by number of chips; numbers the mesh does not divide are left
    out."""
    plans = {}
    for chips in _CHIPS:
        larger = _with_chips(topology, chips, tools)
        if larger is not None and _divides(run, larger):
            scaled = _scaled(run, topology, larger)
            plans[chips] = compile_updates_plan(scaled, larger, tools)
    return plans


def _divides(run: PlannedRun, topology: Topology) -> bool:
    devices_per_copy = run.mesh.size // run.mesh.shape["data"]
    return len(topology.devices) % (devices_per_copy * topology.slices) == 0


def _scaled(run: PlannedRun, topology: Topology, larger: Topology) -> PlannedRun:
    """Return the run with prompts and rows in proportion to the devices."""
    factor, mesh = len(larger.devices) / len(topology.devices), run.mesh.shape
    # At least one prompt for each update, and as many for every update.
    updates = run.training.updates_per_rollout
    prompts = updates * max(1, round(run.prompts_per_step * factor / updates))
    sizes = MeshConfig(**mesh | {"data": round(mesh["data"] * factor)}, slices=larger.slices)
    rows_per_shard = run.training.rows // run.data_shards
    moved = run.on_mesh(sizes, larger.devices, rows_per_shard=rows_per_shard)
    return dataclasses.replace(moved, prompts_per_step=prompts)


def _with_chips(topology: Topology, chips: int, tools: PlanningTools) -> Topology | None:
    """Return `chips` chips as the most cubic slice that is built, in as many slices as before."""
    kind = topology.name.partition(":")[0]
    if topology.chip.kind != "tpu" or chips % topology.slices:
        return None
    for sizes in _slice_shapes(chips // topology.slices, len(topology.sizes)):
        try:
            return tools.find_topology(f"{kind}:{'x'.join(map(str, sizes))}", topology.slices)
        except UsageError:  # that shape is not built
            continue
    return None


def _slice_shapes(chips: int, axes: int) -> list[tuple[int, ...]]:
    """Return all shapes of a slice, the least spread first.

    In: 32, 2.  Out: [(4, 8), (2, 16), (1, 32)].
    """
    if axes == 1:
        return [(chips,)]
    shapes = {
        tuple(sorted((size, *rest)))
        for size in range(1, chips + 1)
        if chips % size == 0
        for rest in _slice_shapes(chips // size, axes - 1)
    }
    return sorted(shapes, key=lambda sizes: sum(sizes))
