"""New prompts, one after the other in rows: prompts of different lengths do not pad to the longest.

Rows are as wide as a cache that holds the longest, and a pass has a power of four of them: a run
sees few shapes, however few prompts are new.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from srft_jax.mesh import largest_of_processes
from srft_jax.objectives.rows import pack
from srft_jax.rollout.cache import Places
from srft_jax.rollout.plan import capacity_for
from srft_jax.rollout.sampler import PackedPrompts
from srft_jax.rollout.slots import Placement

# Of one forward pass and shard: enough to keep a device busy, little enough for its memory.
TOKENS_PER_PASS = 8192


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a placement's prompt begins in the packed rows [shards * B, T] of this process."""

    placement: Placement
    row: int
    start: int


def pack_prompts(
    placements: Sequence[Placement], *, shards: int, num_slots: int, with_forced: bool
) -> Iterator[tuple[PackedPrompts, list[Placed]]]:
    """Passes of a prefill, as many on every process.

    Args:
        placements: Of this process.
        shards: Of this process.
        num_slots: Prompts that a shard keeps.
        with_forced: Some request of the call has forced tokens.
    """
    lengths = [len(one.prompt.tokens) for one in placements]
    (longest,) = largest_of_processes(max(lengths, default=0))
    width = capacity_for(longest)
    rows_of_shard: list[list[list[Placement]]] = []
    for shard in range(shards):
        own = [one for one in placements if one.shard == shard]
        packed = pack([len(one.prompt.tokens) for one in own], width)
        rows_of_shard.append([[own[i] for i in row] for row in packed])

    (deepest,) = largest_of_processes(max(len(rows) for rows in rows_of_shard))
    start = 0
    for num_rows in _passes(deepest, max(1, TOKENS_PER_PASS // max(1, width))):
        of_pass = [rows[start : start + num_rows] for rows in rows_of_shard]
        yield _packed(of_pass, (num_rows, width), num_slots, with_forced)
        start += num_rows


def _passes(num_rows: int, most: int) -> Iterator[int]:
    """Rows of each pass, powers of four, of which a quarter may be empty.

    In: 22 rows, at most 20 at once.  Out: 16, 4, 1, 1.  In: 23.  Out: 16, 4, 4.
    """
    size = 4 ** ((most.bit_length() - 1) // 2)
    while num_rows > 0:
        while num_rows < 0.75 * size:
            size //= 4
        yield size
        num_rows -= size


def _packed(
    rows_of_shard: Sequence[Sequence[Sequence[Placement]]],
    shape: tuple[int, int],
    num_slots: int,
    with_forced: bool,
) -> tuple[PackedPrompts, list[Placed]]:
    num_rows = shape[0]
    size = (len(rows_of_shard) * num_rows, shape[1])
    arrays: list[Any] = [np.zeros(size, np.int32) for _ in range(3)]
    tokens, positions, segment_ids = arrays
    forced: Any = np.full(size, -1, np.int32)
    unused = np.iinfo(np.int32).max  # a slot that no cache has
    places = np.zeros((4, len(rows_of_shard), num_slots), np.int32)
    places[3] = unused
    placed = []
    for shard, rows in enumerate(rows_of_shard):
        number = 0
        for row, line in enumerate(rows):
            start = 0
            for segment, placement in enumerate(line, start=1):
                prompt = placement.prompt
                end = start + len(prompt.tokens)
                where = (shard * num_rows + row, slice(start, end))
                tokens[where], positions[where] = prompt.tokens, np.arange(end - start)
                segment_ids[where] = segment
                first = end - prompt.num_forced - 1  # the token before the first forced one
                forced[where[0], first : end - 1] = prompt.forced
                places[:, shard, number] = row, start, end - start, placement.slot
                placed.append(Placed(placement, where[0], start))
                number, start = number + 1, end
    packed = PackedPrompts(
        tokens,
        positions,
        segment_ids,
        Places(*places.reshape(4, -1)),
        forced if with_forced else None,
    )
    return packed, placed
