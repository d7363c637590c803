"""Rounding to bfloat16: compiler options for programs that must agree, and stochastic rounding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Compiler options that forbid XLA to leave out a rounding to bfloat16 between two operations that
# it fuses. It would leave out different ones in different programs, and log-probs of sampler and
# trainer would differ as much as bfloat16 from float32.
ROUND_AS_WRITTEN = {"xla_allow_excess_precision": False}


def stochastic_round(x: Float[Array, "*shape"], key: Array) -> Float[Array, "*shape"]:
    """Round float32 to one of its two neighbours in bfloat16, so that the result's mean is x.

    In: 1.002, between 1 and 1.0078125.  Out: 1.0078125 in a quarter of the draws, else 1.
    """
    # bfloat16 is the upper half of float32. The carry out of the lower half rounds up.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits + drawn) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
