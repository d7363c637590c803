"""How both sides of benchmarks/gpu.py are measured, and against what."""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from srft_jax.config import ModelConfig
from srft_jax.models.hf_config import read_config
from srft_jax.planning.chips import CHIPS, Chip

# Word of a device's name -> its peaks, where the plan knows them.
CARDS = {"H100": CHIPS["h100"], "H200": CHIPS["h200"], "A100-SXM4-80GB": CHIPS["a100"]}


def card_of(device: str) -> Chip | None:
    """None where its peaks are not known, as of a CPU.

    In: "NVIDIA H100 80GB HBM3", "NVIDIA GH200".  Out: that of h100, None.
    """
    words = device.split()
    if "PCIe" in words:  # slower than the card of that name that the table has
        return None
    return next((chip for name, chip in CARDS.items() if name in words), None)


def model_of(args: argparse.Namespace) -> ModelConfig:
    """The architecture, with room for the sequences at hand."""
    model = read_config(Path(args.architecture))
    longest = max(model.max_positions, args.row_length, args.prompt + args.new)
    layers = args.layers or model.num_layers
    return dataclasses.replace(model, num_layers=layers, max_positions=longest)


def timed(run: Callable[[], object], iters: int) -> float:
    """Median seconds, after two runs to compile and warm up."""
    times = []
    for _ in range(iters + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matmul_params(model: ModelConfig, num_params: int) -> int:
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.dim
    return num_params - lookup


def train_figures(
    args: argparse.Namespace, num_params: int, seconds: float, matmul: float, device: str
) -> dict[str, Any]:
    """Of a step that took so many seconds, beside bare products at `matmul` FLOP/s."""
    model, card = model_of(args), card_of(device)
    tokens = args.microbatches * args.row_length
    length = args.row_length // args.sequences
    attention = 4 * length * model.num_heads * model.head_dim * model.num_layers
    flops = 3.0 * tokens * (2 * matmul_params(model, num_params) + attention)
    return {
        "params": num_params,
        "step_ms": 1e3 * seconds,
        "tokens_per_s": tokens / seconds,
        "tflops_per_s": flops / seconds / 1e12,
        "mfu": flops / seconds / card.flops if card else None,
        "over_matmul": seconds * matmul / flops,
        "matmul_tflops_per_s": matmul / 1e12,
        "device": device,
    }


def sample_figures(
    args: argparse.Namespace, num_params: int, decode: float, prefill: float, device: str
) -> dict[str, Any]:
    """Of `--new` decode steps in so many seconds. The floor's cache is that of the mean length."""
    model, card = model_of(args), card_of(device)
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
        "over_floor": step * card.hbm_rate / floor_bytes if card else None,
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
