"""Rows split over the mesh axis `context`: which device holds which tokens of a row.

For n devices a row of T tokens is cut into 2n chunks, of which device i holds chunks i and
2n - 1 - i: under a causal mask all devices then have as much to do. The n parts of B rows are rows
like any other, [n B, T / n], all first parts first. Whatever is done token by token knows nothing
of it; attention gathers the keys and values of a whole row (ops/mesh_attention.py).

In: a row 0 1 2 3 4 5 6 7, context=2.  Out: parts 0 1 6 7 and 2 3 4 5.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def split_rows(rows: Shaped[Array, "B T"], parts: int) -> Shaped[Array, "nB Tn"]:
    """The parts of rows, as rows; T must be a multiple of 2 `parts`."""
    num_rows, length = rows.shape
    chunks = rows.reshape(num_rows, 2, parts, -1)
    early, late = chunks[:, 0], jnp.flip(chunks[:, 1], axis=1)
    split = jnp.stack([early, late], axis=2)  # [B, n, 2, T / 2n]
    return split.swapaxes(0, 1).reshape(parts * num_rows, length // parts)


def joined_rows(split: Shaped[Array, "nB Tn"], parts: int) -> Shaped[Array, "B T"]:
    """Undoes `split_rows`."""
    by_part = split.reshape(parts, -1, split.shape[1])
    return in_row_order(by_part, axis=1)


def in_row_order(parts: Shaped[Array, "n *axes"], axis: int) -> Array:
    """Parts that are stacked in front, side by side along another of their axes.

    In: parts [[0 1 6 7], [2 3 4 5]], axis 0.  Out: [0 1 2 3 4 5 6 7].
    """
    early, late = jnp.split(parts, 2, axis=axis + 1)
    return jnp.concatenate([*early, *jnp.flip(late, axis=0)], axis=axis)


def slots_of_part(part: int | Array, parts: int, length: int) -> Int[Array, " Tn"]:
    """Where the tokens of a part stand in their row of `length` tokens."""
    chunk = length // (2 * parts)
    columns = jnp.arange(chunk)
    return jnp.concatenate([part * chunk + columns, (2 * parts - 1 - part) * chunk + columns])


def gathered(x: Shaped[Array, "*axes"], axis: int) -> Array:
    """Under `shard_map`: a part's array in the place of its whole row, from all of `context`."""
    return in_row_order(jax.lax.all_gather(x, "context"), axis)
