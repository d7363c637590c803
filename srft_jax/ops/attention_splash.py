"""Attention over packed rows by jax's splash kernel: on TPU.

Scores never leave the chip's fast memory; blocks of keys that no query may see, as far as causality
and window tell, are not read. Differs from the others in one rounding: the kernel has no scale, so
the query is scaled, and rounded to its dtype, before it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.attention_terms import Part, ScoreOptions

# Of queries and keys. Scores of a block, 1 MiB, fit a core's fast memory several times over, and
# its products are large enough for the matrix unit; a multiple of the unit's 128 lanes.
_BLOCK, _LANES = 512, 128


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B T"],
    options: ScoreOptions,
    window: int | None,
    slides: Bool[Array, ""] | None,
    part: Part | None,
) -> Float[Array, "B T N H"]:
    """As `packed_attention`, of one device's rows and heads: the kernel cannot be partitioned.

    Where only the device knows whether the window holds, it chooses between two kernels.
    """
    attend = functools.partial(_attend, options=options, part=part)
    inputs = (query, key, value, segment_ids)
    if window is None or slides is None:
        return attend(*inputs, window=window)
    kinds = (functools.partial(attend, window=reach) for reach in (window, None))
    return jax.lax.cond(slides, *kinds, *inputs)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    options: ScoreOptions,
    part: Part | None,
    window: int | None,
) -> Array:
    length, num_keys, num_heads = query.shape[1], key.shape[2], query.shape[2]
    queries, keys = _padding(length), _padding(num_keys)
    # Tokens that fill the last block are of no segment. Such a query sees nothing: what the kernel
    # makes of it, a mean of values, is cut off.
    key_segment_ids = segment_ids if part is None else part.key_segment_ids
    ids = splash.SegmentIds(_filled(segment_ids, 1, queries), _filled(key_segment_ids, 1, keys))
    query = (query.astype(jnp.float32) * options.scale).astype(query.dtype).swapaxes(1, 2)
    kernel = _kernel(num_heads, length, num_keys, options, part, window)
    mixed = jax.vmap(kernel)(
        _filled(query, 2, queries), _filled(key, 2, keys), _filled(value, 2, keys), ids
    )
    return jnp.asarray(mixed)[:, :, :length].swapaxes(1, 2)


def _block(length: int) -> int:
    """In: 600.  Out: 384, since two blocks of it hold 600."""
    num_blocks = -(-length // _BLOCK)
    return -(-length // (num_blocks * _LANES)) * _LANES


def _padding(length: int) -> int:
    return -length % _block(length)


def _filled(x: Array, axis: int, more: int) -> Array:
    """Ids below all real ones, or zeros, behind."""
    widths = [(0, more if axis == number else 0) for number in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=-1 if x.ndim == 2 else 0)


def _kernel(
    num_heads: int,
    length: int,
    num_keys: int,
    options: ScoreOptions,
    part: Part | None,
    window: int | None,
) -> splash.splash_attention_kernel.SplashAttentionKernel:
    """For queries and keys with their padding.

    With gradients of queries apart from those of keys: fused, the kernel stores one gradient of the
    queries for each block of keys, in their dtype, which is quadratic in T and rounds their sum.
    """
    slots = np.arange(length)[None] if part is None else np.asarray(part.slots)
    slots = np.pad(slots, ((0, 0), (0, _padding(length))), mode="edge")
    mask = splash.LocalMask(
        (slots.size, num_keys + _padding(num_keys)),
        (None if window is None else window - 1, 0),
        offset=0,
    )
    mask.q_sequence = slots.reshape(-1).astype(np.int32)
    block, key_block = _block(length), _block(num_keys)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=key_block,
            block_q_dkv=block,
            block_kv_dkv=key_block,
            block_q_dq=block,
            block_kv_dq=key_block,
        ),
        head_shards=1,
        q_seq_shards=slots.shape[0],
        attn_logits_soft_cap=options.softcap,
        residual_checkpoint_name="attention",
    )
    if part is None:
        return kernel
    return jax.tree.map(functools.partial(_of_part, part, slots.shape[0]), kernel)


def _of_part(part: Part, num_parts: int, info: Array) -> Array:
    """What the kernel knows of its blocks, [heads, blocks of queries, blocks of keys], or of its
    queries, [queries]: of all parts before, of one part after."""
    if info.ndim == 0:
        return info
    axis = 1 if info.ndim == 3 else 0
    size = info.shape[axis] // num_parts
    return jax.lax.dynamic_slice_in_dim(info, part.number * size, size, axis)
