"""The same run on 8 to 256 chips of the kind, where `data` grows and each device keeps its rows."""

from srft_jax.config import UsageError
from srft_jax.planning.planned_run import changed, planned_run
from srft_jax.planning.plans import Plan, Report, updates_plan
from srft_jax.planning.topology import Topology, topology_of
from srft_jax.setup.outline import Outline

_CHIPS = (8, 16, 32, 64, 128, 256)


def scaled_plans(run: Outline, topology: Topology, report: Report) -> dict[int, Plan]:
    """Plans of the updates by the number of chips; those left out that the mesh does not divide."""
    return {
        chips: updates_plan(_scaled(run, topology, larger), larger, report)
        for chips in _CHIPS
        if (larger := _of_size(topology, chips)) is not None and _divides(run, larger)
    }


def _divides(run: Outline, topology: Topology) -> bool:
    of_copy = run.mesh.size // run.mesh.shape["data"]
    return len(topology.devices) % (of_copy * topology.slices) == 0


def _scaled(run: Outline, topology: Topology, larger: Topology) -> Outline:
    """Prompts and rows in proportion to the devices."""
    factor = len(larger.devices) / len(topology.devices)
    mesh, config = run.mesh.shape, run.config
    shards = mesh["data"] * mesh["fsdp"]
    rows = config.training.rows // shards
    data = mesh["data"] * len(larger.devices) // len(topology.devices)
    scaled = changed(
        config,
        mesh={"data": data, "fsdp": mesh["fsdp"], "tensor": mesh["tensor"]},
        data={"prompts_per_step": max(1, round(config.data.prompts_per_step * factor))},
        training={"rows_per_microbatch": rows * data * mesh["fsdp"]},
    )
    return planned_run(scaled, larger.devices)


def _of_size(topology: Topology, chips: int) -> Topology | None:
    """The most cubic slice of so many chips that there is, or as many slices as before."""
    kind = topology.name.partition(":")[0]
    if topology.chip.kind != "tpu" or chips % topology.slices:
        return None
    for sizes in _slices(chips // topology.slices, len(topology.sizes)):
        try:
            return topology_of(f"{kind}:{'x'.join(map(str, sizes))}", topology.slices)
        except UsageError:  # that shape is not built
            continue
    return None


def _slices(chips: int, axes: int) -> list[tuple[int, ...]]:
    """In: 32, 2.  Out: [(4, 8), (2, 16), (1, 32)], the least spread first."""
    if axes == 1:
        return [(chips,)]
    found = {
        tuple(sorted((size, *rest)))
        for size in range(1, chips + 1)
        if chips % size == 0
        for rest in _slices(chips // size, axes - 1)
    }
    return sorted(found, key=lambda sizes: sum(sizes))
