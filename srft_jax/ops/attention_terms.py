"""Terms of attention over packed rows that all its kernels share: options, who sees whom, tiles."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Kernel = Literal["xla", "splash", "cudnn"]

# Far below any real score, and finite: a row that may see nothing (padding) gives a mean of values,
# never a NaN.
MASKED = -1e30

# Ranges of keys start at multiples of this: kernels like even sizes.
_EVEN = 64


class ScoreOptions(NamedTuple):
    """score = softcapped(scale q k^T, softcap)."""

    scale: float
    softcap: float | None = None


class TileSizes(NamedTuple):
    """How many tokens kernels take at a time; does not change results but by rounding.

    Attributes:
        short_keys: Rows of up to this many keys are short: `chunked_attention` takes them, whose
            temporary arrays of T^2 numbers are still small; `looped_attention` takes longer rows.
        most_chunks: Chunks of queries in a short row, at most. A chunk reads no key behind its last
            query, so of T^2 scores T^2 / 2 (1 + 1 / chunks) are computed. More chunks save little
            more, and each is compiled apart.
        least_queries: Queries of a chunk of a short row, at least.
        loop_queries: Queries of a tile of a long row.
        loop_keys: Keys of a tile of a long row.
        splash: Queries, and keys, of a tile of the splash kernel, at most. Scores of a tile, 1 MiB,
            fit a core's fast memory several times over, and its products are large enough for the
            matrix unit.
        cudnn_queries: Queries of a chunk for cuDNN. The mask of 1024 queries and 32k keys, with its
            bias in bfloat16, takes 96 MiB.
    """

    short_keys: int = 1024
    most_chunks: int = 8
    least_queries: int = 64
    loop_queries: int = 256
    loop_keys: int = 512
    splash: int = 512
    cudnn_queries: int = 1024


class Part(NamedTuple):
    """One part of rows that are split over devices: its queries meet the keys of whole rows.

    Attributes:
        slots: Where in the row the queries of each part stand, [parts, T]; known before tracing.
        number: Number of the part that is here.
        key_segment_ids: Segment ids of whole rows.
    """

    slots: np.ndarray
    number: Int[Array, ""]
    key_segment_ids: Int[Array, "B S"]


class Sight(NamedTuple):
    """Which keys a query sees: keys of its segment, not behind it, and within the window.

    Attributes:
        segment_ids: Segment ids of the queries.
        key_segment_ids: Segment ids of the keys.
        slots: Where in the row each query stands; keys stand in order.
        window: Number of slots that a query sees back, its own included; None for all.
    """

    segment_ids: Int[Array, "B T"]
    key_segment_ids: Int[Array, "B S"]
    slots: Int[Array, " T"]
    window: int | Int[Array, ""] | None

    def mask(self, key_slots: Int[Array, " S"]) -> Bool[Array, "B T S"]:
        """Return which keys each query sees.

        Args:
            key_slots: Where in the row the keys of `key_segment_ids` stand.
        """
        ages = self.slots[:, None] - key_slots
        near = ages >= 0 if self.window is None else (ages >= 0) & (ages < self.window)
        return near & (self.segment_ids[:, :, None] == self.key_segment_ids[:, None, :])

    def mask_between(self, queries: slice, keys: slice) -> Bool[Array, "B C S"]:
        """Return which of these keys each of these queries sees."""
        part = Sight(
            segment_ids=self.segment_ids[:, queries],
            key_segment_ids=self.key_segment_ids[:, keys],
            slots=self.slots[queries],
            window=self.window,
        )
        return part.mask(jnp.arange(keys.start, keys.stop))


class Extent(NamedTuple):
    """What is known of a sight before tracing.

    Attributes:
        whole: Rows are whole: query t stands in slot t. Otherwise any query may see any key.
        window: Window of all queries; None without one, or where only the device knows it.
    """

    whole: bool = True
    window: int | None = None

    def chunks(self, length: int, num_keys: int, size: int) -> list[tuple[slice, slice]]:
        """Cut queries into chunks of `size`, each with a range of all keys that it may see.

        In: 256 queries and keys, size 64, a window of 100.
        Out: four chunks; the last has queries [192, 256) and keys [64, 256).
        """
        chunks = []
        for start in range(0, length, size):
            queries = slice(start, min(start + size, length))
            oldest = 0 if self.window is None else max(0, start - self.window + 1)
            keys = slice(oldest // _EVEN * _EVEN, queries.stop)
            chunks.append((queries, keys if self.whole else slice(0, num_keys)))
        return chunks


def make_sight(
    segment_ids: Int[Array, "B T"],
    window: int | None,
    slides: Bool[Array, ""] | None,
    part: Part | None,
) -> Sight:
    """Make the sight of the queries of whole rows, or of one part of split rows.

    Args:
        segment_ids: Segment ids of the queries.
        window: Number of slots that a query sees back.
        slides: Whether the window holds, where only the device knows; None if it does.
        part: The part that the queries are; None for whole rows.
    """
    key_segment_ids = segment_ids if part is None else part.key_segment_ids
    length = key_segment_ids.shape[1]
    slots = jnp.arange(length) if part is None else jnp.asarray(part.slots)[part.number]
    # In a scan over layers with and without a window, a layer without one has the longest.
    reach = window if slides is None or window is None else jnp.where(slides, window, length)
    return Sight(segment_ids, key_segment_ids, slots, reach)


def grouped(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K GT H"]:
    """Put the queries that share a kv head side by side, so that they are one matmul.

    In: 4 query heads, 2 kv heads.  Out: for kv head 0 all queries of head 0, then of head 1.
    """
    batch, length, num_heads, head_dim = query.shape
    query = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return query.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)


def ungrouped(grouped: Float[Array, "B K GT H"], length: int) -> Float[Array, "B T N H"]:
    """Undo `grouped`."""
    batch, num_kv_heads, _, head_dim = grouped.shape
    grouped = grouped.reshape(batch, num_kv_heads, -1, length, head_dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)
