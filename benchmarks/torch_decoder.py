"""A Qwen2 or Llama decoder in plain PyTorch, as benchmarks/gpu.py measures it beside ours.

Written the way its users write it: modules, SDPA with grouped queries, torch.compile, fused AdamW,
autocast over float32 weights to train; to sample, a static cache and a compiled step that CUDA
replays as a graph.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Norm(nn.Module):
    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(dim)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight).type_as(x)


class Block(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = model.num_heads, model.num_kv_heads, model.head_dim
        queries, keys = self.heads * self.size, self.kv_heads * self.size
        bias = model.family == "qwen2"
        self.attention_norm = Norm(model.dim, model.norm_epsilon)
        self.query_key_value = nn.Linear(model.dim, queries + 2 * keys, bias=bias)
        self.output = nn.Linear(queries, model.dim, bias=False)
        self.mlp_norm = Norm(model.dim, model.norm_epsilon)
        self.gate_up = nn.Linear(model.dim, 2 * model.mlp_dim, bias=False)
        self.down = nn.Linear(model.mlp_dim, model.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor, places: Tensor | None, mask: Any) -> Tensor:
        x = x + self.output(self.attention(self.attention_norm(x), angles, places, mask))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def attention(self, x: Tensor, angles: Tensor, places: Tensor | None, mask: Any) -> Tensor:
        batch, length, _ = x.shape
        parts = self.query_key_value(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotated(q, angles), rotated(k, angles)
        if places is not None:  # the cache's columns of these tokens
            self.keys[:, :, places], self.values[:, :, places] = k, v
            k, v = self.keys, self.values
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=places is None, enable_gqa=True
        )
        return y.transpose(1, 2).reshape(batch, length, -1)

    def make_cache(self, batch: int, length: int) -> None:
        like = self.down.weight
        for name in ("keys", "values"):
            shape = (batch, self.kv_heads, length, self.size)
            zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
            torch._dynamo.mark_static_address(zeros)  # a CUDA graph may write to it
            self.register_buffer(name, zeros)


class Decoder(nn.Module):
    """Args: model: a ModelConfig; dtype: of the residual stream; checkpoint: recompute blocks."""

    def __init__(self, model: Any, dtype: str, checkpoint: bool = False) -> None:
        super().__init__()
        if model.family not in ("qwen2", "llama"):
            raise ValueError(f"the family {model.family} is not written in PyTorch here")
        self.dtype, self.checkpoint = getattr(torch, dtype), checkpoint
        self.embedding = nn.Embedding(model.vocab_size, model.dim)
        self.blocks = nn.ModuleList([Block(model) for _ in range(model.num_layers)])
        self.norm = Norm(model.dim, model.norm_epsilon)
        self.head = nn.Linear(model.dim, model.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=model.init_std)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        exponents = torch.arange(0, model.head_dim, 2) / model.head_dim
        self.register_buffer("frequencies", model.rope_theta**-exponents, persistent=False)

    def forward(self, tokens: Tensor, places: Tensor | None = None, mask: Any = None) -> Tensor:
        """Logits [B, T, V]. `places` [T]: columns of the cache, which are the positions."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = (positions if places is None else places)[:, None] * self.frequencies.float()
        x = self.embedding(tokens).to(self.dtype)  # autocast leaves it float32
        for block in self.blocks:
            if self.checkpoint:
                x = recomputed(block, x, angles, places, mask, use_reentrant=False)
            else:
                x = block(x, angles, places, mask)
        return self.head(self.norm(x))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    sine, cosine = angles.sin(), angles.cos()
    y = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return y.type_as(x)


# ---- training ----


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


# ---- sampling ----


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


# ---- what both need ----


def matmul_run(shapes: tuple[tuple[int, int], ...], dtype: str) -> Callable[[], None]:
    x, w, y = (torch.ones(shape, dtype=getattr(torch, dtype), device=DEVICE) for shape in shapes)

    def run() -> None:
        (x @ w) @ y
        synchronize()

    return run


def on_device(model: Decoder) -> Decoder:
    return model.to(DEVICE)


def num_params(model: Decoder) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied head counts once


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
