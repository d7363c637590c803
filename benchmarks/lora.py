"""Memory and time of a train step on all parameters and on low-rank adapters.

    python benchmarks/lora.py --layers 4 --dim 512 --ffn 2048 --heads 8 --vocab 8192

`held_mib`: parameters and optimizer states, the step's arguments but for the batch. `temp_mib`:
what XLA allocates beside them, the gradient among it. `qwen2.5-7b`: by calculation, GiB of
parameters, gradient and two moments. Prints one JSON line last.
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

from srft_jax.config import LoraConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from srft_jax.models import families, init_params, lora
from srft_jax.models.decoder import Runtime
from srft_jax.objectives.methods import PRESETS, expand
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state
from srft_jax.training.step import make_train_step

QWEN25_7B = ModelConfig(
    vocab_size=152064,
    dim=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=18944,
    tie_embeddings=False,
)
# Arm -> the dtype of the frozen base; None trains all.
ARMS = {"full": None, "lora": "float32", "lora_bfloat16": "bfloat16"}


def section_of(args: argparse.Namespace, base_dtype: Any) -> LoraConfig | None:
    return base_dtype and LoraConfig(rank=args.rank, alpha=2.0 * args.rank, base_dtype=base_dtype)


def measure(args: argparse.Namespace, base_dtype: str | None) -> dict[str, float]:
    objective = expand(ObjectiveConfig(preset=args.preset))
    model = lora.adapted(model_of(args), section_of(args, base_dtype))
    optimizer = make_optimizer(OptimizerConfig(), model, num_updates=1000)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    frozen = jax.tree.map(lambda x: x.astype(base_dtype), lora.frozen(params, model))
    state = new_state(lora.trained(params, model), {"policy": optimizer})
    del params
    step = make_train_step(
        model,
        objective,
        optimizer,
        temperature=1.0,
        on_policy=True,
        runtime=Runtime(dtype=args.dtype, remat=args.remat),
        frozen_params=frozen,
        logits_mib=args.logits_mib,
    )
    batch = jax.device_put(batch_of(args, objective))
    compiled = step.func.lower(*step.args, state, batch).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((frozen, state)))
    times = []
    for _ in range(args.iters + 1):  # the first warms up
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(*step.args, state, batch))
        times.append(time.perf_counter() - start)
    assert np.isfinite(metrics["loss/total"]) and not metrics["loss/skipped"]
    return {
        "trained": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "held_mib": held / 2**20,
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "step_ms": 1e3 * statistics.median(times[1:]),
    }


def calculated_gib(model: ModelConfig) -> float:
    """Held and accumulated: float32 parameters, gradient and moments of what is trained."""
    sizes = {True: 0, False: 0}
    for row in families.parameters(model):
        sizes[row.is_adapter] += math.prod(families.stacked_shape(row, model))
    if not sizes[True]:
        return 16 * sizes[False] / 2**30
    of_base = np.dtype(model.lora.base_dtype).itemsize
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
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {"qwen2.5-7b": {}}
    for arm, base_dtype in ARMS.items():
        found[arm] = measure(args, base_dtype)
        qwen = lora.adapted(QWEN25_7B, section_of(args, base_dtype))
        found["qwen2.5-7b"][f"{arm}_gib"] = calculated_gib(qwen)
    shown = {
        name: {key: float(f"{value:.4g}") for key, value in arm.items()}
        for name, arm in found.items()
    }
    print(json.dumps(vars(args) | {"device": jax.devices()[0].device_kind} | shown))


if __name__ == "__main__":
    main()
