"""Memory and time of a train step on all parameters and on low-rank adapters.

    python benchmarks/lora.py --layers 4 --dim 512 --ffn 2048 --heads 8 --vocab 8192

`held_mib`: parameters and optimizer states, which are the step's arguments but for the batch.
`temp_mib`: what XLA allocates beside them, the gradient among it; its CPU backend widens all of a
bfloat16 base to float32 there. `qwen2.5-7b`: by calculation, GiB of parameters, gradient and two
moments. Prints one JSON line last.
"""

import argparse
import json
import math
import statistics
import time
from typing import Any

import jax
import numpy as np
from sizes import add_sizes, model_of
from train_step import batch_of

from srft_jax.config import (
    AdaptedModelConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from srft_jax.models import families, init_params, lora
from srft_jax.models.decoder import Runtime
from srft_jax.objectives.methods import PRESETS, expand
from srft_jax.training.microbatch import FixedParams, ForwardOptions
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state
from srft_jax.training.step import make_train_step

QWEN25_7B = ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, tie_embeddings=False)
# Arm -> the dtype of the frozen base; None trains all.
ARMS = {"full": None, "lora": "float32", "lora_bfloat16": "bfloat16"}


def adapted(args: argparse.Namespace, model: ModelConfig, base_dtype: Any) -> ModelConfig:
    section = LoraConfig(rank=args.rank, alpha=2.0 * args.rank, base_dtype=base_dtype)
    return lora.adapted(model, section if base_dtype else None)


def step_of(args: argparse.Namespace, model: ModelConfig, base_dtype: Any) -> Any:
    """A step; what makes its frozen parameters and state; their shapes, and its batch."""
    objective = expand(ObjectiveConfig(preset=args.preset))
    optimizer = make_optimizer(OptimizerConfig(), model, num_updates=1000)

    def make(key: jax.Array) -> tuple[Any, Any]:
        params = init_params(model, key)
        frozen = jax.tree.map(lambda x: x.astype(base_dtype), lora.frozen(params, model))
        return frozen, new_state(lora.trained(params, model), {"policy": optimizer})

    frozen, state = jax.eval_shape(make, jax.random.key(0))
    runtime = Runtime(dtype=args.dtype, remat=args.remat)
    options = ForwardOptions(model, runtime, temperature=1.0, logits_mib=args.logits_mib)
    step = make_train_step(options, objective, optimizer)
    return step, make, (frozen, state, batch_of(args, objective))


def measure(args: argparse.Namespace, base_dtype: str | None) -> dict[str, float]:
    step, make, shapes = step_of(args, adapted(args, model_of(args), base_dtype), base_dtype)
    frozen, state, batch = shapes
    compiled = step.lower(state, batch, FixedParams(frozen)).compile()
    found = {
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "held_mib": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((frozen, state)))
        / 2**20,
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    frozen, state = jax.jit(make)(jax.random.key(0))
    batch, times = jax.device_put(batch), []
    for _ in range(args.iters + 1):  # the first warms up
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch, FixedParams(frozen)))
        times.append(time.perf_counter() - start)
    assert np.isfinite(metrics["loss/total"]) and not metrics["loss/skipped"]
    return found | {"step_ms": 1e3 * statistics.median(times[1:])}


def calculated_gib(model: ModelConfig) -> float:
    """What is trained four times in float32: parameters, gradient, two moments."""
    sizes = {True: 0, False: 0}
    for row in families.parameters(model):
        sizes[row.is_adapter] += math.prod(families.stacked_shape(row, model))
    of_base = 16
    if isinstance(model, AdaptedModelConfig):
        of_base = 2 if model.lora.base_dtype == "bfloat16" else 4
    return (of_base * sizes[False] + 16 * sizes[True]) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(
        parser,
        batch=16,
        prompt=64,
        completion=192,
        group=8,
        rows_per_microbatch=4,
        logits_mib=64,
        iters=3,
        rank=16,
    )
    parser.add_argument("--remat", choices=["none", "dots", "block"], default="dots")
    parser.add_argument("--preset", choices=list(PRESETS), default="srft")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {"qwen2.5-7b": {}}
    for arm in args.arms:
        found[arm] = measure(args, ARMS[arm])
        found["qwen2.5-7b"][f"{arm}_gib"] = calculated_gib(adapted(args, QWEN25_7B, ARMS[arm]))
    shown = {
        name: {key: float(f"{value:.4g}") for key, value in arm.items()}
        for name, arm in found.items()
    }
    print(json.dumps(vars(args) | {"device": jax.devices()[0].device_kind} | shown))


if __name__ == "__main__":
    main()
