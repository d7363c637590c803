"""The host's table: who gets which row, lane and prompt slot, and in which order."""

import collections

import numpy as np
import pytest
from sampler_models import sampling

from srft_jax.batch import prompt_key
from srft_jax.rollout import Request
from srft_jax.rollout.request import resolved
from srft_jax.rollout.row_table import RowTable, power_of_two

KEY = np.array([3, 4], np.uint32)


def queued(table, requests):
    """`table` with requests added, as a sampler fills them in."""
    table.add([resolved(i, request, sampling()) for i, request in enumerate(requests)], KEY)
    return table


def made_table(requests, *, shards=1, rows=4, prompt_slots=4, lanes=4):
    table = queued(RowTable(shards=shards), requests)
    table.grow(rows=rows, prompt_slots=prompt_slots, lanes=lanes)
    return table


def name(completion):
    return completion.request.group, completion.member


def running(table):
    """(group, member) by row, None where idle."""
    return [[row and name(row.completion) for row in shard] for shard in table.rows]


def drained(table):
    """Completions in the order in which they are admitted, one row retired at a time."""
    order, placed = [], 0
    while True:
        placed += len(table.admit())
        check(table)
        here = [name(row.completion) for row in table.running]
        order += [completion for completion in here if completion not in order]
        if not here:
            return order, placed
        table.retire(next(table.numbered())[0])


def check(table):
    """Rows hold different lanes of their prompts; the index says so."""
    lanes = [
        (shard, row.prompt_slot, row.lane)
        for shard, rows in enumerate(table.rows)
        for row in rows
        if row is not None
    ]
    assert len({*lanes}) == len(lanes)
    index = table.cache_index()
    per_shard, prompt_slots = len(table.rows[0]), len(table.prompts[0])
    for number, row in table.numbered():
        shard, within = divmod(number, per_shard)
        assert table.prompts[shard][row.prompt_slot] is row.prompt
        where = shard * prompt_slots + row.prompt_slot
        assert index["prompt_lengths"][where] == len(row.prompt.tokens)
        assert index["lengths"][number] == row.count - row.prompt.num_forced
        assert index["row_of_lane"][where, row.lane] == within
        assert index["lane_of_row"][number] == row.prompt_slot * table.lanes + row.lane


def test_equal_prompts_are_one_and_forced_tokens_make_another():
    requests = [
        Request([1, 2], 2),
        Request(np.array([1, 2]), 1),
        Request([1], 1, forced=[2]),
        Request([3], 0),
    ]
    entries = queued(RowTable(shards=1), requests).unfinished
    assert [(e.tokens, e.forced, [name(c) for c in e.waiting]) for e in entries] == [
        ((1, 2), (), [(0, 0), (0, 1), (1, 0)]),
        ((1, 2), (2,), [(2, 0)]),
    ]
    assert entries[0].key == prompt_key([1, 2]) and entries[1].key == prompt_key([1])


def test_forced_tokens_at_another_temperature_make_another_prompt():
    """Their log-probs differ; without forced tokens the prompt is the same at any temperature."""
    requests = [Request([1], forced=forced, temperature=t) for forced in ((), [2]) for t in (0, 1)]
    entries = queued(RowTable(shards=1), requests).unfinished
    assert [(e.forced, e.temperature) for e in entries] == [((), 1.0), ((2,), 0), ((2,), 1)]
    assert [len(e.waiting) for e in entries] == [2, 1, 1]


def test_what_is_added_later_joins_a_prompt_that_is_in_use():
    table = made_table([Request([1], 2), Request([2], 1, (), 3)], rows=2, prompt_slots=2)
    assert len(table.admit()) == 1
    queued(table, [Request([1], 1, group=7), Request([2], 1, group=8), Request([3], group=9)])
    assert [(e.tokens, [name(c) for c in e.waiting]) for e in table.unfinished] == [
        ((2,), [(1, 0), (8, 0)]),  # its longest limit is 16 now, and it came before [3]
        ((3,), [(9, 0)]),
        ((1,), [(7, 0)]),
    ]
    table.grow(rows=8, prompt_slots=4, lanes=4)
    assert [job.prompt.tokens for job in table.admit()] == [(2,), (3,)]
    assert running(table)[0][:6] == [(0, 0), (0, 1), (7, 0), (1, 0), (8, 0), (9, 0)]
    check(table)


def test_a_prompt_that_nobody_uses_any_more_is_placed_again():
    """The cache may have shrunk to shorter prompts since."""
    table = made_table([Request([1] * 40), Request([2])], rows=2)
    assert len(table.admit()) == 2
    table.retire(0)
    assert table.longest_prompt == 1
    queued(table, [Request([1] * 40, group=5)])
    assert [job.prompt.tokens for job in table.admit()] == [(1,) * 40]
    assert running(table)[0][:2] == [(5, 0), (1, 0)]


def test_the_longest_limits_start_first_and_equal_ones_in_order():
    limits = (3, None, 40, 3, 16)  # None takes 16
    requests = [Request([i], 1, (), limit) for i, limit in enumerate(limits)]
    order, placed = drained(made_table(requests, rows=1))
    assert [group for group, _ in order] == [2, 1, 4, 0, 3]
    assert placed == 5


def test_completions_of_resident_prompts_start_before_other_prompts():
    table = made_table([Request([1], 3, (), 9), Request([2], 3, (), 8)], rows=2)
    assert [job.prompt.tokens for job in table.admit()] == [(1,)]
    assert running(table) == [[(0, 0), (0, 1)]]
    table.retire(1)
    assert table.admit() == [] and running(table) == [[(0, 0), (0, 2)]]
    table.retire(0)
    assert [(p.prompt_slot, p.prompt.tokens) for p in table.admit()] == [(1, (2,))]
    assert running(table) == [[(1, 0), (0, 2)]]


def test_a_group_larger_than_the_lanes_starts_as_lanes_become_free():
    table = made_table([Request([1], 5), Request([2], 5)], rows=4, prompt_slots=2, lanes=2)
    assert len(table.admit()) == 2
    assert running(table) == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
    table.retire(0)
    assert table.admit() == [] and running(table)[0][0] == (0, 2)
    order, placed = drained(table)
    assert (len(order), placed) == (10 - 1, 0)  # (0, 0) has retired before


def test_a_prompt_keeps_its_slot_until_its_last_completion_ends():
    table = made_table([Request([1]), Request([2]), Request([3])], rows=3, prompt_slots=2, lanes=1)
    assert [job.prompt_slot for job in table.admit()] == [0, 1]
    assert running(table) == [[(0, 0), (1, 0), None]] and table.some_wait
    table.retire(1)
    assert [(p.prompt_slot, p.prompt.tokens) for p in table.admit()] == [(1, (3,))]
    assert not table.some_wait


def test_shards_are_filled_evenly_and_own_their_prompts():
    table = made_table(
        [Request([i], 2) for i in range(6)], shards=3, rows=4, prompt_slots=2, lanes=2
    )
    jobs = table.admit()
    assert [(p.shard, p.prompt_slot) for p in jobs] == [
        (0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1),
    ]  # fmt: skip
    check(table)
    assert table.num_rows == 12 == len(table.running) and not table.some_wait
    assert [number for number, _ in table.numbered()] == [*range(12)]


@pytest.mark.parametrize("seed", range(3))
def test_every_completion_starts_once_and_every_prompt_is_placed_once(seed):
    rng = np.random.default_rng(seed)
    requests = [
        Request([int(rng.integers(9))], int(rng.integers(1, 7)), (), int(rng.integers(1, 99)))
        for _ in range(20)
    ]
    table = made_table(requests, shards=2, rows=5, prompt_slots=3, lanes=3)
    order, placed = drained(table)
    wanted = [
        (r, member) for r, request in enumerate(requests) for member in range(request.group_size)
    ]
    assert collections.Counter(order) == collections.Counter(wanted)
    assert placed == len({tuple(request.prompt) for request in requests})


def test_lengths_that_the_cache_must_hold():
    table = made_table([Request([1] * 7), Request([2], 1, forced=[3] * 4)], rows=2)
    table.admit()
    assert (table.longest_prompt, table.longest_own) == (7, 0)
    first, second = table.running
    first.count, second.count = 3, 6
    assert table.longest_own == 3  # forced tokens are in the prompt's part
    table.retire(0)
    assert (table.longest_prompt, table.longest_own) == (5, 2)


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
