"""From hidden states to a token, its log-prob and the entropy it was drawn at."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Draw(NamedTuple):
    """token: id; logprob, entropy: float32, in nats, of the whole tempered distribution."""

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    entropy: Float[Array, " B"]


def draw(
    hidden: Float[Array, "B D"],
    head: Float[Array, "D V"],
    uniform: Float[Array, " B"],
    forced: Int[Array, " B"],
    temperature: float,
) -> Draw:
    """Draws one token a row by inverting the cumulative distribution at `uniform`.

    One uniform a row is cheaper than Gumbel noise for V entries: random bits are not free.
    In: p = [.2, .5, .3], uniform = .6.  Out: token 1, since .2 <= .6 < .7.

    Args:
        hidden: After the final norm.
        head: Output head.
        uniform: In [0, 1).
        forced: The token to take in place of a drawn one; -1 where none.
        temperature: Divides the logits; 0 takes the likeliest token and reports the statistics at
            temperature 1.
    """
    logits = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits / (temperature or 1.0), axis=-1)
    p = jnp.exp(logp)
    if temperature == 0.0:
        token = jnp.argmax(logp, axis=-1)
    else:
        # Over a large vocabulary a float32 cumsum may step down by rounding. Made monotone, the
        # first entry above the threshold has p > 0.
        cumulative = jax.lax.cummax(jnp.cumsum(p, axis=-1), axis=1)
        # The last entry stands for 1, so that rounding in the sum cannot push a draw past the end.
        token = jnp.sum(cumulative <= uniform[:, None] * cumulative[:, -1:], axis=-1)
    token = jnp.where(forced >= 0, forced, token).astype(jnp.int32)
    logprob = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
    return Draw(token, logprob, -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1))
