"""Sums over the vocabulary, and the token at a point of the cumulative sum, tile by tile.

The vocabulary is cut into G tiles of N tokens that lie G apart: [B, V] is seen as [B, N, G]. Sums
over N are then additions of long rows, which every compiler vectorises (XLA's CPU backend does not
vectorise a sum along the minor axis), and a cumulative sum is needed only over the tiles and inside
the one that was drawn.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_AT_ONCE = 4  # slices combined in one sweep; 2 and 8 are slower on a CPU
_FEW = 8  # a row shorter than this is added up without more sweeps


def in_tiles(x: Float[Array, "B V"], fill: float) -> Float[Array, "B N G"]:
    """Put token t at [t // G, t % G], complete the last row with `fill`; N and G near sqrt(V)."""
    num_sweeps = max(1, round(math.log(x.shape[1], _AT_ONCE) / 2))
    tile_size = _AT_ONCE**num_sweeps
    padding = -x.shape[1] % tile_size
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=fill)
    return x.reshape(x.shape[0], tile_size, -1)


def over_tiles(
    combine: Callable[[Array, Array], Array],
    transform: Callable[..., Array],
    *arrays: Float[Array, "B N G"],
) -> Float[Array, "B G"]:
    """Combine (add, take the maximum of) `transform(*arrays)` over the tokens of every tile.

    `transform` works entry by entry. It is applied to slices, so that XLA need not write its result
    out.
    """
    slices = zip(*(jnp.split(x, _AT_ONCE, axis=1) for x in arrays), strict=True)
    x = functools.reduce(combine, (transform(*entries) for entries in slices))
    while x.shape[1] > 1:
        x = functools.reduce(combine, jnp.split(x, _AT_ONCE, axis=1))
    return x[:, 0]


def over_row(
    combine: Callable[[Array, Array], Array], x: Float[Array, "B G"]
) -> Float[Array, " B"]:
    """Combine each row, again in sweeps: what XLA does by itself along rows takes longer."""
    while (width := x.shape[1] // _AT_ONCE) >= _FEW:
        swept = functools.reduce(combine, jnp.split(x[:, : _AT_ONCE * width], _AT_ONCE, axis=1))
        x = jnp.concatenate([swept, x[:, _AT_ONCE * width :]], axis=1)
    return functools.reduce(combine, (x[:, column] for column in range(x.shape[1])))


def total(transform: Callable[..., Array], *arrays: Float[Array, "B N G"]) -> Float[Array, " B"]:
    """Add up `transform(*arrays)` over the vocabulary."""
    return over_row(jnp.add, over_tiles(jnp.add, transform, *arrays))


def at_least(threshold: Float[Array, " B"]) -> Callable[[Array], Array]:
    """Return a function that maps entries below their row's threshold to 0 and keeps the rest."""
    return lambda p: jnp.where(p >= threshold[:, None, None], p, 0.0)


def token_at(
    weights: Float[Array, "B N G"],
    sums: Float[Array, "B G"],
    uniform: Float[Array, " B"],
    transform: Callable[[Array], Array],
) -> Int[Array, " B"]:
    """Return the token where the cumulative sum of `transform(weights)` passes `uniform` of the
    whole; never one of weight 0.

    In: weights [.2, 0, .5, .3] in one tile, uniform .2.  Out: 2.

    Args:
        weights: In tiles.
        sums: Sums of `transform(weights)` over each tile, at least one of them positive.
        uniform: In [0, 1).
        transform: Works entry by entry; its results are not negative.
    """
    tile, rest = _first_above(sums, uniform * jnp.sum(sums, axis=-1))
    inside = transform(jnp.take_along_axis(weights, tile[:, None, None], axis=2))[:, :, 0]
    row, _ = _first_above(inside, rest)
    return row * sums.shape[1] + tile


def _first_above(
    weights: Float[Array, "B N"], point: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The first positive weight whose cumulative sum is above the point, and how far into it.

    By rounding, no sum may be above the point, and a sum may grow where the weight is 0.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    reached = jnp.where(weights > 0, cumulative, -jnp.inf)
    above = (reached > point[:, None]) | (reached == jnp.max(reached, axis=-1, keepdims=True))
    index = jnp.argmax(above, axis=-1)
    before = jnp.take_along_axis(cumulative - weights, index[:, None], axis=-1)[:, 0]
    return index.astype(jnp.int32), point - before
