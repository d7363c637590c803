"""A Qwen2 or Llama decoder in plain PyTorch, for benchmarks/gpu.py to measure beside ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed


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
