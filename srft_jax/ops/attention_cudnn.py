"""Attention over packed rows by cuDNN, through jax.nn: on NVIDIA GPUs.

jax's door to cuDNN knows causality and windows, but knows sequences packed into one row only by a
mask over [T, S]. So queries go in chunks, and the mask of one chunk exists at a time. The backward
pass makes the mask again, and with it the chunk's output. Memory is linear in T.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from srft_jax.ops.attention_terms import Extent, ScoreOptions, Sight


def cudnn_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    sight: Sight,
    options: ScoreOptions,
    extent: Extent,
    *,
    chunk_size: int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Return `packed_attention`, without a cap on scores.

    Args:
        query: As in `packed_attention`.
        key: As in `packed_attention`.
        value: As in `packed_attention`.
        sight: Which keys each query sees.
        options: Scale of the scores.
        extent: What is known of the sight before tracing.
        chunk_size: Queries of a chunk.
        implementation: Who computes it for jax.nn; "xla" runs on any device.

    Raises:
        ValueError: the options have a cap.
    """
    if options.softcap is not None:
        raise ValueError(f"cuDNN has no cap on scores, but options.softcap = {options.softcap}")

    length = query.shape[1]
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    if length % 2:  # only whole rows can be: parts of rows have an even length
        query, key, value = (_with_one_more(x, 0) for x in (query, key, value))
        ids, key_ids = (_with_one_more(x, -1) for x in (sight.segment_ids, sight.key_segment_ids))
        sight = Sight(ids, key_ids, jnp.arange(length + 1), sight.window)
    attend = functools.partial(_attend, options=options, implementation=implementation)
    # `jax.checkpoint` keeps a chunk's mask from being stored for the backward pass.
    outs = []
    for queries, keys in extent.chunks(query.shape[1], key.shape[1], chunk_size):
        attend_chunk = jax.checkpoint(functools.partial(attend, queries=queries, keys=keys))
        outs.append(attend_chunk(query[:, queries], key[:, keys], value[:, keys], sight))
    return checkpoint_name(jnp.concatenate(outs, axis=1)[:, :length], "attention")


def _with_one_more(x: Array, fill: int) -> Array:
    """Append `fill` along axis 1: cuDNN trains with masks of even sizes only."""
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
        mask=sight.mask_between(queries, keys)[:, None],
        scale=options.scale,
        implementation=implementation,
    )
