"""Models small enough to compile in a blink, and random enough that every parameter counts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.config import ModelConfig, RopeScaling
from srft_jax.models import forward, init_params, output_head
from srft_jax.ops.layers import softcapped

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

LLAMA3 = RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeScaling("yarn", 4.0, 64)

# One of each family, with whatever it can have: windows that are exceeded, scalings that are felt.
FAMILIES = {
    "qwen2": dataclasses.replace(TIED, sliding_window=5, full_attention_layers=(0,)),
    "qwen3": dataclasses.replace(UNTIED, family="qwen3", attention_bias=True, rope_scaling=YARN),
    "llama": dataclasses.replace(
        UNTIED, family="llama", attention_bias=True, mlp_bias=True, rope_scaling=LLAMA3
    ),
    "mistral": dataclasses.replace(UNTIED, family="mistral", sliding_window=4),
    "gemma3": dataclasses.replace(
        TIED,
        family="gemma3",
        num_layers=3,
        activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=20,
        logit_softcap=3.0,
        sliding_window=4,
        full_attention_layers=(1,),
        rope_theta=100_000.0,
        rope_local_theta=1_000.0,
        rope_scaling=RopeScaling("linear", 8.0),
    ),
    "qwen3_moe": dataclasses.replace(
        UNTIED,
        family="qwen3_moe",
        mlp_dim=12,
        num_experts=6,
        experts_per_token=2,
        norm_topk_prob=True,
    ),
}


# Compiled once for all tests that share shapes; running op by op would compile each op instead.
jit_forward = jax.jit(forward, static_argnames=("model_config", "runtime"))


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random biases and norms too; `init_params` makes those 0 and 1, which would hide mistakes.

    By a generator whose numbers stay the same in all versions of NumPy: golden logits are of these.
    """
    rng = np.random.RandomState(seed)
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
        return softcapped(hidden @ output_head(params, config), config.logit_softcap)
