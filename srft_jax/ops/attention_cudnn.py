"""Attention over packed rows by cuDNN, through jax.nn: on NVIDIA GPUs.

What jax offers of cuDNN knows causality and windows, but sequences packed into one row only by a
mask over [T, S]. So queries go in chunks, and there is the mask of one chunk at a time; the
backward pass makes it again, and with it the chunk's output. Memory is linear in T.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from srft_jax.ops.attention_terms import Extent, ScoreOptions, Sight

# Of 1024 queries and 32k keys, mask and its bias in bfloat16 are 96 MiB.
_QUERIES = 1024


def cudnn_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
    options: ScoreOptions,
    extent: Extent,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """As `packed_attention`, without a cap on scores.

    Raises:
        ValueError: the options have a cap.
    """
    if options.softcap is not None:
        raise ValueError(f"cuDNN has no cap on scores, but options.softcap = {options.softcap}")

    length = query.shape[1]
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    if length % 2:  # of whole rows alone: parts are of an even length
        query, key, value = (_one_more(x, 0) for x in (query, key, value))
        ids, key_ids = (_one_more(x, -1) for x in (sight.segment_ids, sight.key_segment_ids))
        sight = Sight(ids, key_ids, jnp.arange(length + 1), sight.window)
    attend = functools.partial(_attend, options=options, implementation=implementation)
    outs = []
    for queries, keys in extent.chunks(query.shape[1], key.shape[1], _QUERIES):
        of_chunk = jax.checkpoint(functools.partial(attend, queries=queries, keys=keys))
        outs.append(of_chunk(query[:, queries], key[:, keys], value[:, keys], sight))
    return checkpoint_name(jnp.concatenate(outs, axis=1)[:, :length], "attention")


def _one_more(x: Array, fill: int) -> Array:
    """Along axis 1: cuDNN trains with masks of even sizes only."""
    return jnp.pad(x, [(0, 1 if axis == 1 else 0) for axis in range(x.ndim)], constant_values=fill)


def _attend(
    query: Float[Array, "B C N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    sight: Sight,
    *,
    queries: slice,
    keys: slice,
    options: ScoreOptions,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B C N H"]:
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=sight.mask_of(queries, keys)[:, None],
        scale=options.scale,
        implementation=implementation,
    )
