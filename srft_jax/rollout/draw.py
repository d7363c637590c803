"""From logits to a token, its log-prob and the entropy it was drawn at."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srft_jax.config import Truncation
from srft_jax.rollout.truncation import threshold
from srft_jax.rollout.vocab_tiles import at_least, in_tiles, over_row, over_tiles, token_at, total


class Draw(NamedTuple):
    """What each row drew: token ids [B]; log-probs and entropies [B] in nats, float32.

    The statistics are those of the whole tempered distribution, which is what the trainer computes,
    also where a truncation allows only some tokens.
    """

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    entropy: Float[Array, " B"]


def which_kinds(
    temperature: Float[Array, " B"], live: bool | Bool[Array, " B"] = True
) -> tuple[Array, Array]:
    """Return whether some live row is greedy, and whether some live row is not; two scalars."""
    return jnp.any(live & (temperature == 0)), jnp.any(live & (temperature > 0))


def draw_tokens(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    temperature: float | Float[Array, " B"],
    truncation: Truncation = Truncation(),
    *,
    kinds: tuple[Array, Array] | None = None,
) -> Draw:
    """Draw one token a row by inverting the cumulative distribution at `uniform`.

    One uniform a row is cheaper than Gumbel noise for V entries: random bits are not free. A token
    of probability 0 is never drawn, and a row's draw depends on that row alone.

    Args:
        logits: Each row has at least one above -inf.
        uniform: In [0, 1).
        temperature: Divides the logits, for all rows or row by row. 0 takes the likeliest token,
            whatever the truncation, and reports the statistics at temperature 1.
        truncation: Tokens that may be drawn.
        kinds: `which_kinds(temperature)`, where a loop of draws has it at hand.
    """
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), uniform.shape)
    kinds = which_kinds(temperature) if kinds is None else kinds
    divisor = jnp.where(temperature > 0, temperature, 1.0)
    scaled = logits.astype(jnp.float32) / divisor[:, None]
    tiles = in_tiles(scaled, -jnp.inf)
    highest = over_row(jnp.maximum, over_tiles(jnp.maximum, _itself, tiles))
    # Computed once: sums, threshold and draw must compare the same bits.
    p = jax.lax.optimization_barrier(jnp.exp(tiles - highest[:, None, None]))
    sums = over_tiles(jnp.add, _itself, p)
    mass = over_row(jnp.add, sums)

    def weighted_gap(p: Array, z: Array) -> Array:
        return jnp.where(p > 0, p * (z - highest[:, None, None]), 0.0)

    entropy = jnp.log(mass) - total(weighted_gap, p, tiles) / mass

    token = _chosen(logits, p, sums, uniform, temperature, truncation, kinds)
    gap = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - highest
    return Draw(token, gap - jnp.log(mass), entropy)


def _chosen(
    logits: Float[Array, "B V"],
    p: Float[Array, "B N G"],
    sums: Float[Array, "B G"],
    uniform: Float[Array, " B"],
    temperature: Float[Array, " B"],
    truncation: Truncation,
    kinds: tuple[Array, Array],
) -> Int[Array, " B"]:
    """The token of each row, from `p` in tiles and `sums`, which `over_tiles` has made of it."""

    def sampled() -> Array:
        if truncation == Truncation():
            return token_at(p, sums, uniform, _itself)
        kept = at_least(threshold(p, truncation))
        return token_at(p, over_tiles(jnp.add, kept, p), uniform, kept)

    def greedy() -> Array:
        return _likeliest(logits)

    some_greedy, some_sampled = kinds
    if truncation == Truncation():
        # Inverting the sums costs next to nothing beside making them, so only the likeliest token
        # is looked for where some row wants it.
        token = sampled()
        return jax.lax.cond(
            some_greedy, lambda: jnp.where(temperature > 0, token, greedy()), lambda: token
        )
    # The threshold takes many sums over the vocabulary: only a mixture of rows pays for both.
    number = jnp.where(some_greedy, jnp.where(some_sampled, 2, 1), 0)
    return jax.lax.switch(
        number, (sampled, greedy, lambda: jnp.where(temperature > 0, sampled(), greedy()))
    )


def _likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first token of the highest logit, as argmax: XLA's costs a CPU more than a draw."""
    tiles = in_tiles(logits.astype(jnp.float32), -jnp.inf)
    highest = over_row(jnp.maximum, over_tiles(jnp.maximum, _itself, tiles))
    _, size, num_tiles = tiles.shape
    ids = jnp.arange(size * num_tiles, dtype=jnp.int32).reshape(1, size, num_tiles)

    def id_if_highest(z: Array, token: Array) -> Array:
        return jnp.where(z == highest[:, None, None], token, logits.shape[1] - 1)

    return over_row(jnp.minimum, over_tiles(jnp.minimum, id_if_highest, tiles, ids))


def _itself(x: Array) -> Array:
    return x
