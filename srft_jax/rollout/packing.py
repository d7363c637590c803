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
from srft_jax.rollout.programs import PackedPrompts
from srft_jax.rollout.sizes import capacity_for
from srft_jax.rollout.slots import Placement

# Tokens of one forward pass on a shard: enough to keep a device busy, little enough for its memory.
TOKENS_PER_PASS = 8192


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a placement's prompt begins in the packed rows [shards * B, T] of this process."""

    placement: Placement
    row: int
    start: int


def pack_prompts(
    placements: Sequence[Placement],
    *,
    shards: int,
    num_slots: int,
    with_forced: bool,
    tokens_per_pass: int = TOKENS_PER_PASS,
) -> Iterator[tuple[PackedPrompts, list[Placed]]]:
    """Yield the passes of a prefill, equally many on every process.

    Args:
        placements: New prompts of this process.
        shards: Shards of this process.
        num_slots: Prompts that a shard keeps.
        with_forced: Some request has forced tokens.
        tokens_per_pass: Most tokens of a pass on a shard.
    """
    lengths = [len(placement.prompt.tokens) for placement in placements]
    (longest,) = largest_of_processes(max(lengths, default=0))
    width = capacity_for(longest)
    rows_of_shard: list[list[list[Placement]]] = []
    for shard in range(shards):
        here = [placement for placement in placements if placement.shard == shard]
        packed = pack([len(placement.prompt.tokens) for placement in here], width)
        rows_of_shard.append([[here[i] for i in row] for row in packed])

    (deepest,) = largest_of_processes(max(len(rows) for rows in rows_of_shard))
    start = 0
    for num_rows in _passes(deepest, max(1, tokens_per_pass // max(1, width))):
        pass_rows = [rows[start : start + num_rows] for rows in rows_of_shard]
        yield _packed(pass_rows, (num_rows, width), num_slots, with_forced)
        start += num_rows


def _passes(num_rows: int, most: int) -> Iterator[int]:
    """Yield the rows of each pass: powers of four, a quarter of which may stay empty.

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
    """One pass as arrays, with every prompt's place in them."""
    num_rows = shape[0]
    size = (len(rows_of_shard) * num_rows, shape[1])
    arrays: list[Any] = [np.zeros(size, np.int32) for _ in range(3)]
    tokens, positions, segment_ids = arrays
    forced: Any = np.full(size, -1, np.int32)
    temperatures: Any = np.ones(size, np.float32)
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
                # Greedy completions say what they would at temperature 1.
                temperatures[where] = prompt.temperature or 1.0
                places[:, shard, number] = row, start, end - start, placement.slot
                placed.append(Placed(placement, where[0], start))
                number, start = number + 1, end
    packed = PackedPrompts(
        tokens,
        positions,
        segment_ids,
        Places(*places.reshape(4, -1)),
        forced if with_forced else None,
        temperatures if with_forced else None,
    )
    return packed, placed
