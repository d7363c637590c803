"""RMSNorm and soft caps: pure array functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*lead D"], scale: Float[Array, " D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*lead D"]:
    """Return x / sqrt(mean(x^2) + epsilon) * (offset + scale), made in float32, in x's dtype."""
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (normed * (scale + offset if offset else scale)).astype(x.dtype)


def softcapped(x: Float[Array, "*lead"], cap: float | None) -> Float[Array, "*lead"]:
    """Return cap tanh(x / cap), which is close to x far below the cap; `x` where cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
