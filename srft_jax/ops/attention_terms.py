"""What all kernels of attention over packed rows are given, and the words for it."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Kernel = Literal["xla", "splash", "cudnn"]

# Far below any real score, finite: a row that may see nothing (padding) gives a mean of values,
# never a NaN.
MASKED = -1e30

# Ranges of keys start at its multiples: kernels like even sizes.
_EVEN = 64


class ScoreOptions(NamedTuple):
    """score = softcapped(scale q k^T, softcap)."""

    scale: float
    softcap: float | None = None


class Part(NamedTuple):
    """Which queries of split rows are here; the keys are those of whole rows, in order.

    Attributes:
        slots: Of each part, where in the row its queries stand, [parts, T]; known before tracing.
        number: Of the part that is here.
        key_segment_ids: Of whole rows.
    """

    slots: np.ndarray
    number: Int[Array, ""]
    key_segment_ids: Int[Array, "B S"]


class Sight(NamedTuple):
    """Which keys a query sees: of its segment, not behind it, and within the window.

    Attributes:
        segment_ids: Of queries.
        key_segment_ids: Of keys.
        slots: Of queries: where in the row they stand; keys stand in order.
        window: Slots up to which a query sees back, itself included.
    """

    segment_ids: Int[Array, "B T"]
    key_segment_ids: Int[Array, "B S"]
    slots: Int[Array, " T"]
    window: int | Int[Array, ""] | None

    def mask(self, key_slots: Int[Array, " S"]) -> Bool[Array, "B T S"]:
        """For the keys at these slots, of which `key_segment_ids` are."""
        ages = self.slots[:, None] - key_slots
        near = ages >= 0 if self.window is None else (ages >= 0) & (ages < self.window)
        return near & (self.segment_ids[:, :, None] == self.key_segment_ids[:, None, :])

    def mask_of(self, queries: slice, keys: slice) -> Bool[Array, "B C S"]:
        """For some of the queries and of the keys."""
        here = Sight(
            self.segment_ids[:, queries],
            self.key_segment_ids[:, keys],
            self.slots[queries],
            self.window,
        )
        return here.mask(jnp.arange(keys.start, keys.stop))


class Extent(NamedTuple):
    """What is known of a sight before tracing.

    Attributes:
        whole: Rows are: query t stands in slot t. Else any query may see any key.
        window: Of all queries; None where they see everything, or only the device knows.
    """

    whole: bool = True
    window: int | None = None

    def chunks(self, length: int, num_keys: int, size: int) -> list[tuple[slice, slice]]:
        """Queries by the size, and a range of keys that has all that they may see.

        In: 256 of both, size 64, a window of 100.  Out: of queries [192, 256) keys [64, 256).
        """
        chunks = []
        for start in range(0, length, size):
            queries = slice(start, min(start + size, length))
            oldest = 0 if self.window is None else max(0, start - self.window + 1)
            keys = slice(oldest // _EVEN * _EVEN, queries.stop)
            chunks.append((queries, keys if self.whole else slice(0, num_keys)))
        return chunks


def sight_of(
    segment_ids: Int[Array, "B T"],
    window: int | None,
    slides: Bool[Array, ""] | None,
    part: Part | None,
) -> Sight:
    """Of queries of whole rows, or of one part of them."""
    key_segment_ids = segment_ids if part is None else part.key_segment_ids
    length = key_segment_ids.shape[1]
    slots = jnp.arange(length) if part is None else jnp.asarray(part.slots)[part.number]
    # In a scan over layers of both kinds, one that sees everything has the longest window.
    reach = window if slides is None or window is None else jnp.where(slides, window, length)
    return Sight(segment_ids, key_segment_ids, slots, reach)


def grouped(query: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K GT H"]:
    """The queries that share a kv head are one matmul."""
    batch, length, num_heads, head_dim = query.shape
    query = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return query.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)


def ungrouped(grouped: Float[Array, "B K GT H"], length: int) -> Float[Array, "B T N H"]:
    batch, num_kv_heads, _, head_dim = grouped.shape
    grouped = grouped.reshape(batch, num_kv_heads, -1, length, head_dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)
