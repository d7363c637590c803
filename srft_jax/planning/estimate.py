"""Updates by arithmetic alone: for GPUs, which nothing here compiles for, and to sort candidates.

Rough where a compiled program is exact: kernels, padding and fusion are left out.
"""

import dataclasses
import math

from srft_jax.config import AdaptedModelConfig
from srft_jax.mesh import split_axes
from srft_jax.models import families
from srft_jax.planning.memory import ResidentBytes, batch_bytes
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import Workload, model_flops

# By remat, the matmul FLOPs of a train step over the model's own. "block" makes all of a block
# again in the backward pass; every policy makes attention's scores again.
_RECOMPUTED: dict[str, float] = {"none": 1.05, "dots": 1.05, "offload": 1.05, "block": 1.36}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Updates of one step, on one device.

    Attributes:
        flops: FLOPs of matmuls.
        hbm: Bytes that the train step holds, by purpose.
        compute: Seconds of matmuls at peak.
        exchange: Seconds of collectives at the links' rate.
    """

    flops: float
    hbm: dict[str, float]
    compute: float
    exchange: float

    @property
    def needed(self) -> float:
        """Bytes that the train step needs."""
        return sum(self.hbm.values())

    @property
    def seconds(self) -> float:
        """Seconds if matmuls and collectives overlap."""
        return max(self.compute, self.exchange)


def estimate_updates(
    run: PlannedRun, work: Workload, topology: Topology, resident: ResidentBytes
) -> Estimate:
    """Return the estimate; `resident` is of any run on this mesh, whatever its rows and remat."""
    chip, training = topology.chip, run.training
    # Rows that are not full cost as much as full ones.
    room = work.updates * work.microbatches * training.rows * training.row_length
    padded = max(work.tokens, room) / work.tokens
    flops = _RECOMPUTED[run.forward.runtime.remat] * padded * model_flops(run.model_config, work)
    flops /= run.mesh.size
    links = 1 if chip.kind != "tpu" else 2 * len(topology.sizes)
    return Estimate(
        flops=flops,
        hbm={
            "parameters": resident.parameters,
            "optimizer": resident.optimizer,
            "batch": batch_bytes(run),
            "gradients": resident.gradients,
            "activations and temporaries": _activations(run) + _gathered(run, resident),
        },
        compute=flops / chip.flops,
        exchange=_bytes_sent(run, work, resident) / (links * chip.link_rate),
    )


def _part_on_device(run: PlannedRun, logical: str, size: int) -> float:
    """Return a device's part of a dimension.  In: "heads", 28, on tensor=4.  Out: 7."""
    axes = split_axes(run.mesh, logical, size)
    return size / math.prod(run.mesh.shape[axis] for axis in axes)


def _itemsize(run: PlannedRun) -> int:
    """Return the bytes of an activation."""
    return 2 if run.forward.runtime.dtype == "bfloat16" else 4


def _frozen_itemsize(run: PlannedRun) -> int:
    """Return the bytes of a frozen parameter; without adapters there are none."""
    model = run.model_config
    dtype = model.lora.base_dtype if isinstance(model, AdaptedModelConfig) else "float32"
    return 2 if dtype == "bfloat16" else 4


def _activations(run: PlannedRun) -> float:
    """Return bytes of a microbatch: kept by all layers, in use in one layer, and logits."""
    model = run.model_config
    heads = model.head_dim * (
        2 * _part_on_device(run, "heads", model.num_heads)
        + 2 * _part_on_device(run, "kv_heads", model.num_kv_heads)
    )
    hidden = 2 * _part_on_device(run, "mlp", model.mlp_dim) * (model.experts_per_token or 1)
    kept = {
        "none": 6 * model.dim + 2 * heads + 2.5 * hidden,
        "dots": 2 * model.dim + heads + hidden,
        "block": model.dim,
        "offload": model.dim,  # the rest is in the host's memory
    }[run.forward.runtime.remat]
    at_work = 2 * (6 * model.dim + 2 * heads + 2 * hidden)
    tokens, logits = run.tokens_on_device, run.forward.logits_mib * 2**20
    return tokens * _itemsize(run) * (model.num_layers * kept + at_work) + logits


def _gathered(run: PlannedRun, resident: ResidentBytes) -> float:
    """Return bytes gathered over `fsdp` while in use; they are still split over `tensor`.

    These are the head and one layer, in the activations' dtype, and if they are trained their
    float32 gradients; the head's is there before and after its sum. A microbatch's own gradient of
    everything comes on top.
    """
    model, size = run.model_config, _itemsize(run)
    gradient = 0 if run.has_adapters else 4
    head = model.dim * _part_on_device(run, "vocab", model.vocab_size)
    stacked = (
        families.stacked_shape(parameter, model)
        for parameter in families.parameters(model)
        if parameter.stacked
    )
    layer = sum(map(math.prod, stacked)) / model.num_layers / run.mesh.shape["tensor"]
    return (size + 2 * gradient) * head + (size + gradient) * layer + resident.gradients


def _bytes_sent(run: PlannedRun, work: Workload, resident: ResidentBytes) -> float:
    """Return the bytes that a device sends in the updates of a step.

    Each microbatch gathers the policy's parameters over `fsdp` twice and those of a reference once,
    as it has no backward pass, in the activations' dtype, whatever they are kept in. It sums its
    gradients over the devices with other rows. Blocks sum over `tensor` four times.
    """
    model, shape, size = run.model_config, run.mesh.shape, _itemsize(run)
    fsdp, tensor = shape["fsdp"], shape["tensor"]
    # Numbers on all devices that share a copy, from bytes on one of them.
    trained, frozen = resident.trained / 4 * fsdp, resident.frozen / _frozen_itemsize(run) * fsdp
    reference = 0.0
    if run.objective.uses_reference:
        reference = frozen if run.base_is_reference else resident.reference / 4 * fsdp
    gathered = 2 * (trained + frozen) + reference
    row_devices = run.data_shards * shape["context"]
    gathers = size * gathered * (fsdp - 1) / fsdp
    sums = 2 * size * trained * (row_devices - 1) / row_devices
    stream = 4 * model.num_layers * model.dim * run.tokens_on_device * size
    sent = gathers + sums + 2 * stream * (tensor - 1) / tensor
    return sent * work.microbatches * work.updates
