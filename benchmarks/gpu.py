"""Training and sampling of one model on one GPU, beside the same work in PyTorch in one run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --architecture assets/architectures/Qwen2.5-Math-7B --microbatches 2

Each of `train` and `sample`, by each of `ours` and `torch`, runs in a process of its own, so that
none finds memory taken by another; one that fails is reported with its last line. Weights are
random, of the shapes in `--architecture`; nothing stops a completion before its length.

Train: `--microbatches` rows of `--row-length` tokens, each of `--sequences` sequences packed, then
one update; float32 master weights, AdamW, clipping, products in `--dtype`. Ours is the train step
of a run on SRFT; PyTorch computes log-prob, entropy and a weighted likelihood, compiled, SDPA,
with its sequences as a batch [sequences, length], where ours has segment ids. `mfu`: FLOPs
3 (2 n_mm tokens + 4 T^2 N H L sequences), T the length of a sequence, n_mm all parameters but an
input embedding that is not the head too, no credit for causality or recomputation, over the card's
dense bfloat16 peak. `over_matmul`: the same at the rate of a bare (x @ w) @ y, timed beside it.

Sample: `--batch` prompts of `--prompt` tokens and `--new` new ones each, parameters in `--dtype`.
`over_floor`: seconds of a decode step over reading the parameters and the used cache once at the
card's peak bandwidth. Prints one JSON line last.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Part of a device's name -> dense bfloat16 TFLOP/s, GB/s. The first that is found counts.
CARDS = {
    "H100 PCIe": (756.0, 2000.0),
    "H100": (989.4, 3350.0),
    "H200": (989.4, 4800.0),
    "B200": (2250.0, 8000.0),
    "A100-SXM4-80GB": (312.0, 2039.0),
    "A100": (312.0, 1555.0),
}


def card_of(device: str) -> tuple[float, float] | None:
    """None where its peaks are not known, as of a CPU."""
    return next((peaks for name, peaks in CARDS.items() if name in device), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="assets/architectures/Qwen2.5-Math-1.5B")
    parser.add_argument("--layers", type=int, help="fewer than the architecture has")
    for name, default in dict(
        row_length=8192, sequences=4, microbatches=4, logits_mib=1024,
        batch=64, prompt=512, new=512, segment=64, iters=5,
    ).items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--remat", choices=["none", "dots", "block"], default="dots")
    parser.add_argument("--torch-checkpoint", action="store_true", help="recompute its blocks too")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch eager")
    parser.add_argument("--only", nargs="*", default=list(PARTS), help="parts to run")
    parser.add_argument("--part", choices=PARTS, help="of the process at hand; set by the first")
    args = parser.parse_args()
    if args.row_length % args.sequences:
        parser.error(f"--sequences {args.sequences} does not divide --row-length {args.row_length}")
    if args.part:
        print(json.dumps(rounded(PARTS[args.part](args))))
        return
    found: dict[str, Any] = {part: run_alone(part) for part in args.only}
    print(json.dumps(vars(args) | found | compared(found)))


def run_alone(part: str) -> dict[str, Any]:
    """The part in a process of its own."""
    if part.startswith("torch") and importlib.util.find_spec("torch") is None:
        return {"error": "torch is not installed"}
    # Nearly all memory, and tracebacks that end with their error.
    options = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", "JAX_TRACEBACK_FILTERING": "off"}
    command = [sys.executable, *sys.argv, "--part", part]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    found = json.loads(last) if done.returncode == 0 else {"error": last[:500]}
    print(part, json.dumps(found), flush=True)
    return found


def compared(found: dict[str, Any]) -> dict[str, float]:
    """Ours over PyTorch's, where both are there and are the same model."""
    ratios = {}
    for task in ("train", "sample"):
        ours, theirs = (found.get(f"{side}_{task}", {}) for side in ("ours", "torch"))
        if "tokens_per_s" in ours and "tokens_per_s" in theirs:
            assert ours["params"] == theirs["params"], (ours["params"], theirs["params"])
            ratios[f"{task}_over_torch"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
    return rounded(ratios)


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def model_of(args: argparse.Namespace) -> Any:
    """The architecture, with room for the sequences at hand."""
    from srft_jax.models.config_hf import read_config

    model = read_config(Path(args.architecture))
    longest = max(model.max_positions, args.row_length, args.prompt + args.new)
    layers = args.layers or model.num_layers
    return dataclasses.replace(model, num_layers=layers, max_positions=longest)


# ---- figures that both sides are measured by ----


def timed(run: Callable[[], object], iters: int) -> float:
    """Median seconds, after two runs to compile and warm up."""
    times = []
    for _ in range(iters + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matmul_params(model: Any, num_params: int) -> int:
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.dim
    return num_params - lookup


def train_figures(
    args: argparse.Namespace, num_params: int, seconds: float, matmul: float, device: str
) -> dict[str, Any]:
    """Of a step that took so many seconds, beside bare products at `matmul` FLOP/s."""
    model, peaks = model_of(args), card_of(device)
    tokens = args.microbatches * args.row_length
    length = args.row_length // args.sequences
    attention = 4 * length * model.num_heads * model.head_dim * model.num_layers
    flops = 3.0 * tokens * (2 * matmul_params(model, num_params) + attention)
    return {
        "params": num_params,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "tflops_per_s": flops / seconds / 1e12,
        "mfu": flops / seconds / peaks[0] / 1e12 if peaks else None,
        "over_matmul": seconds * matmul / flops,
        "matmul_tflops_per_s": matmul / 1e12,
        "device": device,
    }


def sample_figures(
    args: argparse.Namespace, num_params: int, decode: float, prefill: float, device: str
) -> dict[str, Any]:
    """Of `--new` decode steps in so many seconds. The floor's cache is that of the mean length."""
    model, peaks = model_of(args), card_of(device)
    size = 2 if args.dtype == "bfloat16" else 4
    columns = args.batch * (args.prompt + args.new / 2)
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * columns
    floor_bytes = size * (matmul_params(model, num_params) + cache)
    step = decode / args.new
    return {
        "params": num_params,
        "decode_step_ms": 1e3 * step,
        "tokens_per_s": args.batch / step,
        "floor_gb": floor_bytes / 1e9,
        "over_floor": step * peaks[1] * 1e9 / floor_bytes if peaks else None,
        "prefill_ms": 1e3 * prefill,
        "device": device,
    }


def matmul_shapes(args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    """Of x, w and y in (x @ w) @ y."""
    model = model_of(args)
    return (
        (args.row_length, model.dim),
        (model.dim, model.mlp_dim),
        (model.mlp_dim, model.dim),
    )


def matmul_flops(args: argparse.Namespace) -> float:
    model = model_of(args)
    return 4.0 * args.row_length * model.dim * model.mlp_dim


# ---- ours ----


def ours_train(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    from srft_jax.config import ObjectiveConfig, OptimizerConfig
    from srft_jax.models.decoder import Runtime, init_params, num_params
    from srft_jax.objectives.methods import expand
    from srft_jax.training.optimizer import make_optimizer
    from srft_jax.training.state import new_state
    from srft_jax.training.step import make_train_step

    model, objective = model_of(args), expand(ObjectiveConfig(preset="srft"))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), model, num_updates=1000)
    step = make_train_step(
        model,
        objective,
        optimizer,
        temperature=1.0,
        on_policy=True,
        runtime=Runtime(dtype=args.dtype, remat=args.remat),
        logits_mib=args.logits_mib,
    )
    make = jax.jit(lambda key: new_state(init_params(model, key), {"policy": optimizer}))
    state = make(jax.random.key(0))
    count, batch = num_params(state.params), jax.device_put(packed_batch(args, objective, model))

    def run() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        assert np.isfinite(metrics["loss/total"]) and not metrics["loss/skipped"]

    seconds = timed(run, args.iters)
    return train_figures(args, count, seconds, our_matmul(args), device_kind()) | our_memory()


def packed_batch(args: argparse.Namespace, objective: Any, model: Any) -> Any:
    """`--microbatches` of one full row each; an eighth of each sequence is its prompt, and every
    eighth sequence a demonstration."""
    import numpy as np

    from srft_jax.batch import Role
    from srft_jax.config import TrainingConfig
    from srft_jax.objectives.rows import TrainingSequence, make_batch

    random, length = np.random.default_rng(0), args.row_length // args.sequences
    sequences = []
    for number in range(args.microbatches * args.sequences):
        tokens = random.integers(0, model.vocab_size, length + 1)  # the last is a target only
        sequences.append(
            TrainingSequence(
                tokens[: length // 8],
                tokens[length // 8 :],
                Role.DEMONSTRATION if number % 8 == 7 else Role.SELF,
                advantage=float(random.normal()),
                correct=bool(number % 2),
            )
        )
    training = TrainingConfig(row_length=args.row_length, rows_per_microbatch=1)
    return make_batch(
        sequences,
        objective,
        training,
        num_microbatches=args.microbatches,
        length_cap=length,
    )


def ours_sample(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    from srft_jax.models.decoder import init_params, num_params
    from srft_jax.rollout import Progress, Request, SamplingConfig, sample

    model = model_of(args)
    make = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(args.dtype), init_params(model, key))
    )
    params = make(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (args.batch, args.prompt))
    requests = [Request(prompt.tolist()) for prompt in prompts]
    sampling = SamplingConfig(
        max_new_tokens=args.new, slots=args.batch, segment=args.segment, dtype=args.dtype
    )
    ends: list[Progress] = []

    def run() -> None:
        seen: list[Progress] = []
        sample(params, model, requests, jax.random.key(len(ends)), sampling, observer=seen.append)
        assert seen[-1].tokens == args.batch * args.new
        ends.append(seen[-1])

    timed(run, args.iters)
    counted = ends[2:]
    # What the host does between two segments is part of decoding.
    decode = statistics.median(one.seconds - one.prefill_seconds for one in counted)
    prefill = statistics.median(one.prefill_seconds for one in counted)
    count = num_params(params)
    found = sample_figures(args, count, decode, prefill, device_kind())
    return found | {"decode_steps": counted[-1].steps} | our_memory()


def our_matmul(args: argparse.Namespace) -> float:
    """FLOP/s of one (x @ w) @ y."""
    import jax
    import jax.numpy as jnp

    x, w, y = (jnp.ones(shape, args.dtype) for shape in matmul_shapes(args))
    product = jax.jit(lambda x, w, y: (x @ w) @ y)
    seconds = timed(lambda: jax.block_until_ready(product(x, w, y)), 9)
    return matmul_flops(args) / seconds


def device_kind() -> str:
    import jax

    return jax.devices()[0].device_kind


def our_memory() -> dict[str, Any]:
    """What the allocator has given at most; a CPU does not say."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return {"peak_gib": stats["peak_bytes_in_use"] / 2**30 if stats else None}


# ---- PyTorch ----


def torch_train(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch_decoder as theirs

    model = theirs.on_device(theirs.Decoder(model_of(args), args.dtype, args.torch_checkpoint))
    run = theirs.train_run(model, args)
    seconds = timed(run, args.iters)
    product = theirs.matmul_run(matmul_shapes(args), args.dtype)
    matmul = matmul_flops(args) / timed(product, 9)
    count = theirs.num_params(model)
    return train_figures(args, count, seconds, matmul, theirs.device_name()) | {
        "peak_gib": theirs.peak_gib(),
        "version": torch.__version__,
    }


def torch_sample(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch_decoder as theirs

    model = theirs.on_device(theirs.Decoder(model_of(args), args.dtype))
    model.to(getattr(torch, args.dtype))
    run = theirs.sample_run(model, args)
    times = [run() for _ in range(args.iters + 2)][2:]
    prefill, decode = (statistics.median(one[i] for one in times) for i in (0, 1))
    count = theirs.num_params(model)
    return sample_figures(args, count, decode, prefill, theirs.device_name()) | {
        "peak_gib": theirs.peak_gib(),
        "version": torch.__version__,
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ours_train": ours_train,
    "torch_train": torch_train,
    "ours_sample": ours_sample,
    "torch_sample": torch_sample,
}


if __name__ == "__main__":
    main()
