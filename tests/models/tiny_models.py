"""Models small enough to compile in a blink, and random enough that every parameter counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.config import ModelConfig
from srft_jax.models import forward, init_params, output_head

TIED = ModelConfig(
    vocab_size=64,
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    rope_theta=10_000.0,
)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)


# Compiled once for all tests that share shapes; running op by op would compile each op instead.
jit_forward = jax.jit(forward, static_argnames=("model_config", "runtime"))


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random biases and norms too; `init_params` makes those 0 and 1, which would hide mistakes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.25, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def logits(
    params: dict[str, Any], config: ModelConfig, tokens: Any, positions: Any, segment_ids: Any
) -> jax.Array:
    """Float32 [B, T, V], matmuls at full precision."""
    with jax.default_matmul_precision("highest"):
        inputs = (jnp.asarray(x, jnp.int32) for x in (tokens, positions, segment_ids))
        hidden = jit_forward(params, config, *inputs).hidden
        return hidden @ output_head(params, config)
