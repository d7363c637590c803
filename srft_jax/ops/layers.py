"""RMSNorm and rotary positions: pure array functions."""

import jax
import jax.numpy as jnp
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
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
