"""RMSNorm and rotary positions: pure array functions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rms_norm(
    x: Float[Array, "*lead D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "*lead D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale, the mean in float32, the result in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def rope(
    x: Float[Array, "B T heads H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T heads H"]:
    """Rotates the pair (x[i], x[i + H/2]) by positions * theta^(-2i/H), the layout of Hugging
    Face's Llama and Qwen.

    Angles are float32: in bfloat16 position 257 would already equal 256.
    """
    half = x.shape[-1] // 2
    # On the host, rounded where transformers rounds: an ulp of a frequency is 2e-3 rad at 30,000.
    exponents = (np.arange(half, dtype=np.float32) / np.float32(half)).astype(np.float64)
    frequencies = np.float32(1) / (np.float64(np.float32(theta)) ** exponents).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
