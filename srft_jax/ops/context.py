"""Rows split over the mesh axis `context`: which device holds which tokens of a row.

For n devices a row of T tokens is cut into 2n chunks, of which device i holds chunks i and
2n - 1 - i: under a causal mask all devices then have equal work. The n parts of B rows are rows
like any other, [n B, T / n], all first parts first. Token-wise layers need no change; attention
gathers the keys and values of a whole row (ops/mesh_attention.py).

In: a row 0 1 2 3 4 5 6 7, context=2.  Out: parts 0 1 6 7 and 2 3 4 5.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


def slots(parts: int, length: int) -> np.ndarray:
    """Return where in a row of `length` tokens the tokens of each part stand, [n, T / n].

    In: 2, 8.  Out: [[0 1 6 7], [2 3 4 5]].
    """
    # Chunk i with chunk 2n - 1 - i, for each part i.
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.stack([chunks[:parts], chunks[: parts - 1 : -1]], axis=1).reshape(parts, -1)


def split_rows(rows: Shaped[Array, "B T"], parts: int) -> Shaped[Array, "nB Tn"]:
    """Split rows into their parts, which are rows again; T must be a multiple of 2 n."""
    length = rows.shape[1]
    return rows[:, slots(parts, length)].swapaxes(0, 1).reshape(-1, length // parts)


def joined_rows(split: Shaped[Array, "nB Tn"], parts: int) -> Shaped[Array, "B T"]:
    """Undo `split_rows`."""
    length = split.shape[1] * parts
    by_row = split.reshape(parts, -1, split.shape[1]).swapaxes(0, 1).reshape(-1, length)
    return by_row[:, np.argsort(slots(parts, length), axis=None)]


def whole_rows(x: Shaped[Array, "*axes"], axis: int) -> Array:
    """Gather whole rows, under `shard_map`, from the parts that devices hold along `axis`.

    Slices put the parts in order: their gradients are put side by side. Gradients of indexing would
    be scattered.
    """
    parts = jax.lax.all_gather(x, "context")
    # The early halves of all parts stand in order, the late halves in reverse order.
    early, late = jnp.split(parts, 2, axis=axis + 1)
    return jnp.concatenate([*early, *jnp.flip(late, axis=0)], axis=axis)
