"""Attention over packed rows by cuDNN, through jax.nn: on NVIDIA GPUs.

What jax offers of cuDNN knows causality and windows, but sequences packed into one row only by a
mask over [T, S]. So queries go in chunks, and there is the mask of one chunk at a time; the
backward pass makes it again, and with it the chunk's output. Memory is linear in T.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from srft_jax.ops.attention_terms import ScoreOptions, Sight

# Of 1024 queries and 32k keys, mask and its bias in bfloat16 are 96 MiB.
_QUERIES = 1024


def cudnn_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
    options: ScoreOptions,
    *,
    whole: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """As `packed_attention`, without a cap on scores; of `whole` rows, query t stands in slot t.

    Raises:
        ValueError: the options have a cap.
    """
    if options.softcap is not None:
        raise ValueError(f"cuDNN has no cap on scores, but options.softcap = {options.softcap}")

    @jax.checkpoint
    def attend(query: Array, key: Array, value: Array, sight: Sight) -> Array:
        mask = sight.mask(jnp.arange(key.shape[1]))
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask[:, None],
            scale=options.scale,
            implementation=implementation,
        )
