"""New prompts, one after the other in rows: prompts of different lengths do not pad to the longest.

Rows are as long as the capacity for the longest new prompt; a pass has 1, 4, 16, ... rows. So few
shapes compile.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from srft_jax.mesh import largest_of_processes
from srft_jax.objectives.rows import pack
from srft_jax.rollout.cache import CacheWrites
from srft_jax.rollout.programs import PackedPrompts
from srft_jax.rollout.row_table import PrefillJob
from srft_jax.rollout.sizes import capacity_for

# Tokens of one forward pass on a shard: enough to keep a device busy, little enough for its memory.
TOKENS_PER_PASS = 8192


@dataclasses.dataclass(frozen=True)
class PackedAt:
    """Where a job's prompt begins in the packed rows [shards * B, T] of this process."""

    job: PrefillJob
    row: int
    start: int


def pack_prompts(
    jobs: Sequence[PrefillJob],
    *,
    shards: int,
    num_prompt_slots: int,
    longest: int,
    with_forced: bool,
) -> Iterator[tuple[PackedPrompts, list[PackedAt]]]:
    """Yield the passes of a prefill, equally many on every process.

    Args:
        jobs: New prompts of this process.
        shards: Shards of this process.
        num_prompt_slots: Prompts that a shard keeps.
        longest: Tokens of the longest new prompt of any process.
        with_forced: Some request has forced tokens.
    """
    width = capacity_for(longest)
    rows_of_shard: list[list[list[PrefillJob]]] = []
    for shard in range(shards):
        here = [job for job in jobs if job.shard == shard]
        packed = pack([len(job.prompt.tokens) for job in here], width)
        rows_of_shard.append([[here[i] for i in row] for row in packed])

    (deepest,) = largest_of_processes(max(len(rows) for rows in rows_of_shard))
    start = 0
    for num_rows in _passes(deepest, max(1, TOKENS_PER_PASS // width)):
        pass_rows = [rows[start : start + num_rows] for rows in rows_of_shard]
        yield _packed(pass_rows, (num_rows, width), num_prompt_slots, with_forced)
        start += num_rows


def _passes(num_rows: int, most: int) -> Iterator[int]:
    """Yield the rows of each pass: powers of four, a quarter of which may stay empty.

    In: 22 rows, at most 20 at once.  Out: 16, 4, 1, 1.  In: 23.  Out: 16, 4, 4.
    """
    size = 4 ** ((most.bit_length() - 1) // 2)  # the largest power of four up to `most`
    while num_rows > 0:
        # A pass that would stay more than a quarter empty is made of smaller ones.
        while num_rows < 0.75 * size:
            size //= 4
        yield size
        num_rows -= size


def _packed(
    rows_of_shard: Sequence[Sequence[Sequence[PrefillJob]]],
    shape: tuple[int, int],
    num_prompt_slots: int,
    with_forced: bool,
) -> tuple[PackedPrompts, list[PackedAt]]:
    """One pass as arrays, with where every prompt is in them."""
    num_rows = shape[0]
    size = (len(rows_of_shard) * num_rows, shape[1])
    arrays: list[Any] = [np.zeros(size, np.int32) for _ in range(3)]
    tokens, positions, segment_ids = arrays
    forced: Any = np.full(size, -1, np.int32)
    temperatures: Any = np.ones(size, np.float32)
    unused = np.iinfo(np.int32).max  # a slot that no cache has
    writes = np.zeros((4, len(rows_of_shard), num_prompt_slots), np.int32)
    writes[3] = unused
    packed_at = []
    for shard, rows in enumerate(rows_of_shard):
        number = 0
        for row, line in enumerate(rows):
            start = 0
            for segment, job in enumerate(line, start=1):
                prompt = job.prompt
                end = start + len(prompt.tokens)
                where = (shard * num_rows + row, slice(start, end))
                tokens[where], positions[where] = prompt.tokens, np.arange(end - start)
                segment_ids[where] = segment
                first = end - prompt.num_forced - 1  # the token before the first forced one
                forced[where[0], first : end - 1] = prompt.forced
                # Greedy completions say what they would at temperature 1.
                temperatures[where] = prompt.temperature or 1.0
                writes[:, shard, number] = row, start, end - start, job.prompt_slot
                packed_at.append(PackedAt(job, where[0], start))
                number, start = number + 1, end
    packed = PackedPrompts(
        tokens,
        positions,
        segment_ids,
        CacheWrites(*writes.reshape(4, -1)),
        forced if with_forced else None,
        temperatures if with_forced else None,
    )
    return packed, packed_at
