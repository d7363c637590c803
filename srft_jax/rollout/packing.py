"""New prompts, one after the other in rows: prompts of different lengths do not pad to the longest.

Rows are as wide as a cache that holds the longest and come in powers of two: a run sees few shapes.
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
from srft_jax.rollout.slots import Placement, power_of_two

# Of one forward pass and shard: enough to keep a device busy, little enough for its memory.
_TOKENS_PER_PASS = 8192


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a placement's prompt begins in the packed rows [shards * B, T] of this process."""

    placement: Placement
    row: int
    start: int


def pack_prompts(
    placements: Sequence[Placement], *, shards: int, with_forced: bool
) -> Iterator[tuple[PackedPrompts, list[Placed]]]:
    """Passes of a prefill, as many on every process.

    Args:
        placements: Of this process.
        shards: Of this process.
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

    most_rows = max(1, _TOKENS_PER_PASS // max(1, width))
    (deepest,) = largest_of_processes(max(len(rows) for rows in rows_of_shard))
    num_rows = min(most_rows, power_of_two(deepest))
    passes = [
        [rows[start : start + num_rows] for rows in rows_of_shard]
        for start in range(0, deepest, num_rows)
    ]
    (most,) = largest_of_processes(
        max((len([o for row in rows for o in row]) for one in passes for rows in one), default=0)
    )
    for one in passes:
        yield _packed(one, (num_rows, width), power_of_two(most), with_forced)


def _packed(
    rows_of_shard: Sequence[Sequence[Sequence[Placement]]],
    shape: tuple[int, int],
    prompts_per_shard: int,
    with_forced: bool,
) -> tuple[PackedPrompts, list[Placed]]:
    num_rows = shape[0]
    size = (len(rows_of_shard) * num_rows, shape[1])
    arrays: list[Any] = [np.zeros(size, np.int32) for _ in range(3)]
    tokens, positions, segment_ids = arrays
    forced: Any = np.full(size, -1, np.int32)
    unused = np.iinfo(np.int32).max  # a slot that no cache has
    places = np.zeros((4, len(rows_of_shard), prompts_per_shard), np.int32)
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
