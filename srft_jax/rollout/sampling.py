"""From logits to a token, its log-prob and the entropy it was drawn at."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from srft_jax.rollout.blocks import at_least, in_blocks, over_blocks, over_row, token_at, total
from srft_jax.rollout.truncation import Truncation, threshold


class Draw(NamedTuple):
    """What a row drew. Statistics are float32, in nats.

    token: id.
    logprob, entropy: Of the whole tempered distribution, which is what the trainer computes.
    drawn_logprob: Of the truncated, renormalised distribution; `logprob` without truncation.
    """

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    entropy: Float[Array, " B"]
    drawn_logprob: Float[Array, " B"]


def draw(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    temperature: float,
    truncation: Truncation = Truncation(),
) -> Draw:
    """Draws one token a row by inverting the cumulative distribution at `uniform`.

    One uniform a row is cheaper than Gumbel noise for V entries: random bits are not free. A token
    of probability 0 is never drawn, and a row's draw depends on that row alone.

    Args:
        logits: At least one of a row above -inf.
        uniform: In [0, 1).
        temperature: Divides the logits; 0 takes the likeliest token, whatever the truncation, and
            reports the statistics at temperature 1.
        truncation: Tokens that may be drawn.
    """
    scaled = logits.astype(jnp.float32) / (temperature or 1.0)
    blocks = in_blocks(scaled, -jnp.inf)
    highest = over_row(jnp.maximum, over_blocks(jnp.maximum, _itself, blocks))
    # Computed once: sums, threshold and draw must compare the same bits.
    p = jax.lax.optimization_barrier(jnp.exp(blocks - highest[:, None, None]))
    sums = over_blocks(jnp.add, _itself, p)
    mass = over_row(jnp.add, sums)

    def weighted_gap(p: Array, z: Array) -> Array:
        return jnp.where(p > 0, p * (z - highest[:, None, None]), 0.0)

    entropy = jnp.log(mass) - total(weighted_gap, p, blocks) / mass
    drawn_mass = mass
    if temperature == 0.0:
        token = _first_equal(blocks, highest, logits.shape[1])
    elif truncation == Truncation():
        token = token_at(p, sums, uniform, _itself)
    else:
        kept = at_least(threshold(p, truncation))
        sums = over_blocks(jnp.add, kept, p)
        drawn_mass = over_row(jnp.add, sums)
        token = token_at(p, sums, uniform, kept)
    gap = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - highest
    return Draw(token, gap - jnp.log(mass), entropy, gap - jnp.log(drawn_mass))


def _first_equal(
    blocks: Float[Array, "B N G"], value: Float[Array, " B"], vocab: int
) -> Int[Array, " B"]:
    """What argmax finds, given the maximum. XLA's argmax over V costs a CPU more than the draw."""
    _, size, num_blocks = blocks.shape
    ids = jnp.arange(size * num_blocks, dtype=jnp.int32).reshape(1, size, num_blocks)

    def id_if_equal(z: Array, token: Array) -> Array:
        return jnp.where(z == value[:, None, None], token, vocab - 1)

    return over_row(jnp.minimum, over_blocks(jnp.minimum, id_if_equal, blocks, ids))


def _itself(x: Array) -> Array:
    return x
