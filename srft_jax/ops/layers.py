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


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of positions * theta^(-2i/H), i < H/2; made once for all layers.

    Angles are float32: in bfloat16 position 257 would already equal 256.
    """
    half = head_dim // 2
    # On the host, rounded where transformers rounds: an ulp of a frequency is 2e-3 rad at 30,000.
    exponents = (np.arange(half, dtype=np.float32) / np.float32(half)).astype(np.float64)
    frequencies = np.float32(1) / (np.float64(np.float32(theta)) ** exponents).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T heads H"]:
    """Rotates the pair (x[i], x[i + H/2]) by its angle, the layout of Hugging Face's Llama and
    Qwen."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
