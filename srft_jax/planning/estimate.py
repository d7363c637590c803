"""A plan by arithmetic alone: of GPUs, which nothing here compiles for, and to sort candidates.

Rough where the compiled program is exact: kernels, padding and fusion are not in it.
"""

import dataclasses
import math

from srft_jax.mesh import split_axes
from srft_jax.models import families
from srft_jax.planning.memory import Held, batch_bytes
from srft_jax.planning.topology import Topology
from srft_jax.planning.workload import Workload, model_flops
from srft_jax.setup.outline import Outline

# Of a train step's products of matrices, how much more is computed where the backward pass makes
# parts of a block again; without it attention's own scores are, which is in all of them.
_AGAIN: dict[str, float] = {"none": 1.05, "dots": 1.05, "offload": 1.05, "block": 1.36}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of the updates of a step, on one device.

    Attributes:
        flops: Products of matrices.
        hbm: Bytes that the train step holds, by purpose.
        compute: Seconds at peak.
        exchange: Seconds of collectives at the links' rate.
    """

    flops: float
    hbm: dict[str, float]
    compute: float
    exchange: float

    @property
    def needed(self) -> float:
        return sum(self.hbm.values())

    @property
    def seconds(self) -> float:
        return max(self.compute, self.exchange)


def estimate(run: Outline, work: Workload, topology: Topology, of_run: Held) -> Estimate:
    """Of the run as configured, from what it holds anyway."""
    chip = topology.chip
    wasted = _read_tokens(run, work) / work.tokens  # rows that are not full cost as much
    flops = _AGAIN[run.config.model.remat] * wasted * model_flops(run, work) / run.mesh.size
    links = 1 if chip.kind != "tpu" else 2 * len(topology.sizes)
    sent = _sent(run, work, of_run)
    return Estimate(
        flops=flops,
        hbm={
            "parameters": of_run.parameters,
            "optimizer": of_run.optimizer,
            "batch": batch_bytes(run),
            "gradients": of_run.gradients,
            "activations and temporaries": _activations(run) + _gathered(run, of_run),
        },
        compute=flops / chip.flops,
        exchange=sent / (links * chip.link_rate),
    )


def _read_tokens(run: Outline, work: Workload) -> int:
    training = run.config.training
    rows = work.updates * work.microbatches * training.rows
    return max(work.tokens, rows * training.row_length)


def _local_tokens(run: Outline) -> float:
    """Of a microbatch, on one device."""
    training, shape = run.config.training, run.mesh.shape
    rows = training.rows / (shape["data"] * shape["fsdp"])
    return rows * training.row_length / shape["context"]


def _split(run: Outline, logical: str, size: int) -> float:
    axes = split_axes(run.mesh, logical, size)
    return size / math.prod(run.mesh.shape[axis] for axis in axes)


def _activations(run: Outline) -> float:
    """What all layers keep of a microbatch, what one layer has at work, and tiles of logits."""
    model, tokens = run.model_config, _local_tokens(run)
    of_head = model.head_dim * (
        2 * _split(run, "heads", model.num_heads) + 2 * _split(run, "kv_heads", model.num_kv_heads)
    )
    hidden = 2 * _split(run, "mlp", model.mlp_dim) * (model.experts_per_token or 1)
    kept = {
        "none": 6 * model.dim + 2 * of_head + 2.5 * hidden,
        "dots": 2 * model.dim + of_head + hidden,
        "block": model.dim,
        "offload": model.dim,  # the rest is in the host's memory
    }[run.config.model.remat]
    at_work = 2 * (6 * model.dim + 2 * of_head + 2 * hidden)
    size = 2 if run.config.model.dtype == "bfloat16" else 4
    logits = run.config.training.logits_mib * 2**20
    return tokens * size * (model.num_layers * kept + at_work) + logits


def _gathered(run: Outline, of_run: Held) -> float:
    """What is whole on a device for a moment, over `tensor` apart, and a microbatch's own gradient.

    The head and one layer, in the activations' dtype, and where they are trained their float32
    gradients: the head's before and after it is summed.
    """
    model = run.model_config
    size = 2 if run.config.model.dtype == "bfloat16" else 4
    of_gradient = 0 if run.config.model.lora else 4
    head = model.dim * _split(run, "vocab", model.vocab_size)
    stacked = (
        families.stacked_shape(row, model) for row in families.parameters(model) if row.stacked
    )
    layer = sum(map(math.prod, stacked)) / model.num_layers / run.mesh.shape["tensor"]
    gathered = (size + 2 * of_gradient) * head + (size + of_gradient) * layer
    return gathered + of_run.gradients


def _sent(run: Outline, work: Workload, of_run: Held) -> float:
    """Bytes that a device sends in the updates of a step.

    Each microbatch gathers parameters over `fsdp` twice in the activations' dtype and sums its
    gradients over the devices that have other rows; blocks sum what `tensor` splits, four times.
    """
    model, shape = run.model_config, run.mesh.shape
    size = 2 if run.config.model.dtype == "bfloat16" else 4
    numbers = of_run.gradients / 4 * shape["fsdp"]  # of what is trained, on the devices of a copy
    whole = size * (of_run.parameters / 4 * shape["fsdp"])
    fsdp, rows = shape["fsdp"], shape["data"] * shape["fsdp"] * shape["context"]
    sent = 2 * whole * (fsdp - 1) / fsdp + 2 * size * numbers * (rows - 1) / rows
    tensor = shape["tensor"]
    between = 4 * model.num_layers * model.dim * _local_tokens(run) * size
    sent += 2 * between * (tensor - 1) / tensor
    return sent * work.microbatches * work.updates
