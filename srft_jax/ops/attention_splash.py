"""Attention over packed rows by jax's splash kernel: on TPU.

Scores never leave the chip's fast memory. Tiles of keys behind the queries or beyond the window are
not read. It differs from the other kernels in one rounding: splash has no scale, so the query is
scaled, and rounded to its dtype, before it. (jax calls a tile a block.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops.attention_terms import Part, ScoreOptions

# Lanes of a TPU's matrix unit; the size of a tile is a multiple.
_LANES = 128


class _Cut(NamedTuple):
    """How many tokens there are, how they are cut into tiles, and how the kernel runs.

    Attributes:
        length: Queries of a row, without padding.
        num_keys: Keys of a row, without padding.
        most_tokens: Tokens of a tile, at most.
        interpret: Whether the kernel is interpreted, on any device.
    """

    length: int
    num_keys: int
    most_tokens: int
    interpret: bool

    @property
    def query_tile(self) -> int:
        return _tile(self.length, self.most_tokens)

    @property
    def key_tile(self) -> int:
        return _tile(self.num_keys, self.most_tokens)

    @property
    def query_padding(self) -> int:
        return -self.length % self.query_tile

    @property
    def key_padding(self) -> int:
        return -self.num_keys % self.key_tile


def splash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B T"],
    options: ScoreOptions,
    window: int | None,
    slides: Bool[Array, ""] | None,
    part: Part | None,
    *,
    most_tokens: int,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Return `packed_attention` for one device's rows and heads: XLA cannot partition the kernel.

    Where only the device knows whether the window holds, it chooses between two kernels.
    """
    cut = _Cut(query.shape[1], key.shape[2], most_tokens, interpret)
    attend = functools.partial(_attend, options=options, part=part, cut=cut)
    inputs = (query, key, value, segment_ids)
    if window is None or slides is None:
        return attend(*inputs, window=window)
    # One kernel with the window, one without: a kernel's mask is known before tracing.
    kinds = (functools.partial(attend, window=reach) for reach in (window, None))
    return jax.lax.cond(slides, *kinds, *inputs)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    options: ScoreOptions,
    part: Part | None,
    cut: _Cut,
    window: int | None,
) -> Array:
    # Tokens that fill the last tile are of no segment. Such a query sees nothing: its result, a
    # mean of values, is cut off.
    key_segment_ids = segment_ids if part is None else part.key_segment_ids
    ids = splash.SegmentIds(
        q=_padded(segment_ids, 1, cut.query_padding),
        kv=_padded(key_segment_ids, 1, cut.key_padding),
    )
    query = (query.astype(jnp.float32) * options.scale).astype(query.dtype).swapaxes(1, 2)
    kernel = _kernel(query.shape[1], options, part, cut, window)
    mixed = jax.vmap(kernel)(
        _padded(query, 2, cut.query_padding),
        _padded(key, 2, cut.key_padding),
        _padded(value, 2, cut.key_padding),
        ids,
    )
    return jnp.asarray(mixed)[:, :, : cut.length].swapaxes(1, 2)


def _tile(length: int, most_tokens: int) -> int:
    """Return the smallest multiple of 128 for which as few tiles as possible hold `length` tokens.

    In: 600, at most 512.  Out: 384, since two tiles of 384 hold 600 tokens.
    """
    num_tiles = -(-length // most_tokens)
    return -(-length // (num_tiles * _LANES)) * _LANES


def _padded(x: Array, axis: int, more: int) -> Array:
    """Append zeros, or to ids [B, T] an id that no token has."""
    widths = [(0, more if axis == number else 0) for number in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=-1 if x.ndim == 2 else 0)


def _kernel(
    num_heads: int,
    options: ScoreOptions,
    part: Part | None,
    cut: _Cut,
    window: int | None,
) -> splash.splash_attention_kernel.SplashAttentionKernel:
    """Make the kernel for queries and keys with their padding.

    It computes gradients by queries apart from gradients by keys. The fused kernel would store one
    gradient by queries for each tile of keys, in the queries' dtype: quadratic in T, and their sum
    is rounded.
    """
    slots = np.arange(cut.length)[None] if part is None else np.asarray(part.slots)
    # Queries of all parts, one part after the other; the mask compares slots, not positions in the
    # array, so that it is causal for parts of rows, too.
    slots = np.pad(slots, ((0, 0), (0, cut.query_padding)), mode="edge")
    mask = splash.LocalMask(
        shape=(slots.size, cut.num_keys + cut.key_padding),
        window_size=(None if window is None else window - 1, 0),
        offset=0,
    )
    mask.q_sequence = slots.reshape(-1).astype(np.int32)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=cut.query_tile,
            block_kv=cut.key_tile,
            block_q_dkv=cut.query_tile,
            block_kv_dkv=cut.key_tile,
            block_q_dq=cut.query_tile,
            block_kv_dq=cut.key_tile,
        ),
        head_shards=1,
        q_seq_shards=slots.shape[0],
        attn_logits_soft_cap=options.softcap,
        residual_checkpoint_name="attention",
        interpret=cut.interpret,
    )
    if part is None:
        return kernel
    # The kernel now knows the tiles of all parts, as if they were shards of one row: keep one part.
    return jax.tree.map(functools.partial(_select_part, part, slots.shape[0]), kernel)


def _select_part(part: Part, num_parts: int, info: Array) -> Array:
    """Cut an array of the kernel for all parts down to the part that is here.

    Args:
        part: The part that is here.
        num_parts: Number of parts.
        info: By tile, [heads, tiles of queries, tiles of keys], or by query, [queries], or scalar.
    """
    if info.ndim == 0:
        return info
    axis = 1 if info.ndim == 3 else 0
    size = info.shape[axis] // num_parts
    return jax.lax.dynamic_slice_in_dim(info, part.number * size, size, axis)
