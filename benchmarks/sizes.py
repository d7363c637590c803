"""The sizes of a model as flags; by default those of the peer's measurements."""

import argparse
from typing import Any

from srft_jax.config import ModelConfig

_MODEL = dict(layers=4, dim=256, ffn=1024, heads=4, kv_heads=2, head_dim=64, vocab=4096)


def add_sizes(parser: argparse.ArgumentParser, **others: int) -> None:
    """Flags of the model and these others, by their defaults."""
    for name, default in (_MODEL | others).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def model_of(args: argparse.Namespace, **others: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=args.vocab,
        dim=args.dim,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        mlp_dim=args.ffn,
        tie_embeddings=False,
        **others,
    )
