"""PyTorch's side of benchmarks/gpu.py, as its users write it: SDPA, torch.compile, fused AdamW,
autocast over float32 weights; to sample, a compiled step that CUDA replays as a graph."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_figures import (
    matmul_flops,
    matmul_shapes,
    model_of,
    sample_figures,
    timed,
    train_figures,
)
from torch import Tensor, nn
from torch_decoder import Decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(args: argparse.Namespace) -> dict[str, Any]:
    model = Decoder(model_of(args), args.dtype, args.torch_checkpoint).to(DEVICE)
    seconds = timed(train_run(model, args), args.iters)
    matmul = matmul_flops(args) / timed(matmul_run(matmul_shapes(args), args.dtype), 9)
    found = train_figures(args, num_params(model), seconds, matmul, device_name())
    return found | {"peak_gib": peak_gib(), "version": torch.__version__}


def sample(args: argparse.Namespace) -> dict[str, Any]:
    model = Decoder(model_of(args), args.dtype).to(DEVICE, getattr(torch, args.dtype))
    run = sample_run(model, args)
    times = [run() for _ in range(args.iters + 2)][2:]
    prefill, decode = (statistics.median(one[i] for one in times) for i in (0, 1))
    found = sample_figures(args, num_params(model), decode, prefill, device_name())
    return found | {"peak_gib": peak_gib(), "version": torch.__version__}


def loss_of(model: Decoder, tokens: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Log-prob and entropy of every token, and a likelihood weighted by e^-H, as SRFT has it."""
    logprobs = F.log_softmax(model(tokens).float(), dim=-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    chosen = logprobs.gather(-1, targets[..., None])[..., 0]
    return -(weights * (-entropy).exp() * chosen).mean()


def train_run(model: Decoder, args: argparse.Namespace) -> Callable[[], None]:
    """() -> one update of all microbatches, done when it returns."""
    model.train()
    loss = loss_of if args.no_compile else torch.compile(loss_of)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=DEVICE == "cuda"
    )
    shape = (args.microbatches, args.sequences, args.row_length // args.sequences)
    vocab = model.embedding.num_embeddings
    tokens, targets = (torch.randint(vocab, shape, device=DEVICE) for _ in range(2))
    weights = torch.randn(shape, device=DEVICE)

    def run() -> None:
        for microbatch in zip(tokens, targets, weights, strict=True):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                share = loss(model, *microbatch) / args.microbatches
            share.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()

    return run


def sample_run(model: Decoder, args: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """() -> seconds of prefill and of `--new` decode steps."""
    model.eval()
    length = args.prompt + args.new
    for block in model.blocks:
        block.make_cache(args.batch, length)
    columns = torch.arange(length, device=DEVICE)
    vocab = model.embedding.num_embeddings
    prompts = torch.randint(vocab, (args.batch, args.prompt), device=DEVICE)

    def next_tokens(tokens: Tensor, places: Tensor) -> Tensor:
        """Drawn at temperature 1 without waiting for the device."""
        logits = model(tokens, places, columns <= places[:, None])[:, -1].float()
        probabilities = torch.softmax(logits, dim=-1)
        noise = torch.empty_like(probabilities).exponential_(1)
        return (probabilities / noise).argmax(-1, keepdim=True)

    step = next_tokens if args.no_compile else torch.compile(next_tokens, mode="reduce-overhead")

    @torch.no_grad()
    def run() -> tuple[float, float]:
        start = time.perf_counter()
        tokens = next_tokens(prompts, columns[: args.prompt])
        synchronize()
        middle = time.perf_counter()
        places = columns[args.prompt : args.prompt + 1].clone()
        for _ in range(args.new):
            tokens = step(tokens, places).clone()  # a graph's output is overwritten by the next
            places += 1
        synchronize()
        return middle - start, time.perf_counter() - middle

    return run


def matmul_run(shapes: tuple[tuple[int, int], ...], dtype: str) -> Callable[[], None]:
    x, w, y = (torch.ones(shape, dtype=getattr(torch, dtype), device=DEVICE) for shape in shapes)

    def run() -> None:
        (x @ w) @ y
        synchronize()

    return run


def num_params(model: Decoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
