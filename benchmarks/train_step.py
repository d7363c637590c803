"""Time and memory of the whole train step beside the bare matrix products that it cannot avoid.

    python benchmarks/train_step.py --vocab 4096 --preset srft

`step_over_bare_matmul`: the model's FLOPs, 3 (2 n_mm B T + 4 T^2 N H L B) with n_mm all parameters
but the input embedding and no credit for causality, at the rate of a jitted (x @ w) @ y with
x [B T, D], w [D, F], y [F, D], timed between the steps. `--against grpo` alternates with another
preset on as many rows. Prints one JSON line last.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sizes import add_sizes, model_of
from trajectories import random_trajectory

from srft_jax.batch import Batch, Role
from srft_jax.config import Objective, ObjectiveConfig, OptimizerConfig, TrainingConfig
from srft_jax.models.decoder import Runtime, init_params, num_params
from srft_jax.objectives.methods import PRESETS, expand
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.training.microbatch import FixedParams, ForwardOptions
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state
from srft_jax.training.step import make_train_step


def batch_of(args: argparse.Namespace, objective: Objective) -> Batch:
    """Rows of one prompt and completion each; one of each group is a demonstration if used."""
    random = np.random.default_rng(0)
    sequences = []
    for number in range(args.batch):
        demonstration = objective.trains_demonstrations and number % args.group == args.group - 1
        tokens = random.integers(0, args.vocab, args.prompt + args.completion)
        sequences.append(
            TrainingSequence(
                tokens[: args.prompt].tolist(),
                random_trajectory(
                    tokens[args.prompt :], None if demonstration else -8.0, number % 2 == 1
                ),
                Role.DEMONSTRATION if demonstration else Role.SELF,
                advantage=float(random.normal()),
            )
        )
    rows = args.rows_per_microbatch
    training = TrainingConfig(
        row_length=args.prompt + args.completion - 1, rows_per_microbatch=rows
    )
    return make_batch(
        sequences,
        objective,
        training,
        num_microbatches=-(-args.batch // rows),
        length_cap=args.completion,
        on_policy=True,
    )


def model_flops(args: argparse.Namespace, num_matmul_params: int) -> float:
    length = args.prompt + args.completion
    attention = 4 * length**2 * args.heads * args.head_dim * args.layers * args.batch
    return 3.0 * (2 * num_matmul_params * args.batch * length + attention)


def bare_rate(args: argparse.Namespace) -> Any:
    """() -> FLOP/s of one (x @ w) @ y."""
    tokens = args.batch * (args.prompt + args.completion)
    x, w, y = (
        jnp.ones(shape, args.dtype)
        for shape in ((tokens, args.dim), (args.dim, args.ffn), (args.ffn, args.dim))
    )
    product = jax.jit(lambda x, w, y: (x @ w) @ y)
    jax.block_until_ready(product(x, w, y))

    def rate() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(x, w, y))
        return 4.0 * tokens * args.dim * args.ffn / (time.perf_counter() - start)

    return rate


def compile_step(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """A compiled step with its inputs, and what XLA says of it."""
    objective, model = expand(ObjectiveConfig(preset=preset)), model_of(args)
    optimizer = make_optimizer(OptimizerConfig(), model, num_updates=1000)
    params = init_params(model, jax.random.key(0))
    runtime = Runtime(dtype=args.dtype, remat=args.remat)
    options = ForwardOptions(model, runtime, temperature=1.0, logits_mib=args.logits_mib)
    step = make_train_step(options, objective, optimizer)
    reference = jax.tree.map(jnp.copy, params) if objective.uses_reference else None
    fixed = FixedParams(reference=reference)
    state = new_state(params, {"policy": optimizer})
    batch = jax.device_put(batch_of(args, objective))
    start = time.perf_counter()
    compiled = step.lower(state, batch, fixed).compile()
    return {
        "run": lambda state: compiled(state, batch, fixed),
        "state": state,
        "matmul_params": num_params(params) - params["embedding"].size,
        "params_mib": 4 * num_params(params) / 2**20,
        "compile_s": time.perf_counter() - start,
        "xla_temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def timed(step: dict[str, Any]) -> float:
    """Seconds of one update, which the step's state takes part in."""
    start = time.perf_counter()
    step["state"], metrics = jax.block_until_ready(step["run"](step["state"]))
    taken = time.perf_counter() - start
    assert np.isfinite(metrics["loss/total"]) and not metrics["loss/skipped"]
    return taken


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Medians over iterations; of ratios, each to what was timed just before it."""
    step, rate = compile_step(args, args.preset), bare_rate(args)
    other = compile_step(args, args.against) if args.against else None
    times, over_bare, over_other = [], [], []
    for iteration in range(args.iters + 1):
        bare = statistics.median(rate() for _ in range(9))
        of_other = timed(other) if other else 0.0
        taken = timed(step)
        if iteration:  # the first warms up
            times.append(taken)
            over_bare.append(taken * bare / model_flops(args, step["matmul_params"]))
            over_other.append(taken / of_other if other else 0.0)
    median = statistics.median(times)
    found = {
        "step_ms_median": 1e3 * median,
        "tokens_per_s": args.batch * (args.prompt + args.completion) / median,
        "step_over_bare_matmul": statistics.median(over_bare),
        "xla_temp_mib": step["xla_temp_mib"],
        "params_mib": step["params_mib"],
        "compile_s": step["compile_s"],
    }
    return found | ({"step_over_against": statistics.median(over_other)} if other else {})


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
        iters=5,
    )
    parser.add_argument("--remat", choices=["none", "dots", "block"], default="dots")
    parser.add_argument("--preset", choices=list(PRESETS), default="srft")
    parser.add_argument("--against", choices=list(PRESETS), help="timed alternately with it")
    args = parser.parse_args()
    found = measure(args)
    shown = {k: float(f"{v:.4g}") for k, v in found.items()}
    print(json.dumps(vars(args) | {"device": jax.devices()[0].device_kind} | shown))


if __name__ == "__main__":
    main()
