"""Rows, prompts and lanes from requests and memory."""

import dataclasses

import pytest
from sampler_models import CONFIG, sampling

from srft_jax.config import UsageError
from srft_jax.mesh import exchange
from srft_jax.rollout import Request
from srft_jax.rollout.request import resolved
from srft_jax.rollout.row_table import RowTable
from srft_jax.rollout.sizes import (
    Demand,
    SamplerSizes,
    cache_budget_mib,
    capacity_for,
    demand_on,
    grown_sizes,
    sampler_sizes,
)

# 2 x 16 layers x 8 heads x 64 x 4 bytes: 64 KiB a token.
LARGE = dataclasses.replace(CONFIG, num_layers=16, num_heads=8, num_kv_heads=8, head_dim=64)


def demand_of(requests, config):
    table = RowTable(shards=1)
    table.add([resolved(i, request, config) for i, request in enumerate(requests)], None)
    return demand_on(table, config.slots)


def sizes_for(requests, model_config=CONFIG, **changes):
    config = sampling(**changes)
    demand, budget = demand_of(requests, config), cache_budget_mib(config)
    sizes = sampler_sizes(model_config, demand, config, None, budget)
    assert sizes.shards == sizes.local_shards == 1
    return sizes


def grown(floor, requests, model_config=CONFIG, *, cache_mib=2048, **changes):
    config = sampling(**changes)
    return grown_sizes(floor, model_config, demand_of(requests, config), config, None, cache_mib)


def groups(number, size, length=1):
    return [Request([i] * length, size) for i in range(number)]


def test_capacities_are_few_and_at_most_half_is_spare():
    assert [capacity_for(n) for n in (0, 1, 32, 33, 48, 49, 65, 97, 200)] == [
        0, 32, 32, 64, 64, 64, 128, 128, 256,
    ]  # fmt: skip
    for length in range(128, 5_000):
        assert length <= capacity_for(length) <= 1.5 * length
    assert len({capacity_for(length) for length in range(1, 32_769)}) == 19


@pytest.mark.parametrize(
    ("requests", "slots", "rows", "prompts", "lanes"),
    [
        (groups(1, 1), 256, 1, 1, 1),
        (groups(1, 5), 256, 8, 1, 8),
        (groups(3, 4), 256, 12, 4, 4),
        (groups(3, 3), 256, 12, 4, 4),
        (groups(3, 4), 8, 8, 4, 4),
        (groups(100, 16), 64, 64, 18, 16),  # four prompts are being completed, 18 are kept
        (groups(100, 16), 16, 16, 6, 16),
        ([*groups(30, 7), Request([98], 8), Request([99], 8)], 64, 64, 32, 8),
        (groups(32, 7), 64, 64, 32, 8),  # as where two of them have no demonstration
        (groups(100, 1), 64, 64, 64, 1),
        (groups(2, 100), 64, 64, 2, 64),
        ([*groups(50, 1), Request([99], 8)], 32, 32, 18, 8),
    ],
)
def test_sizes(requests, slots, rows, prompts, lanes):
    wanted = SamplerSizes(1, rows, prompts, lanes, prompt_capacity=32, capacity=32, stop_ids=4)
    assert sizes_for(requests, slots=slots) == wanted


def test_demand_counts_what_runs_as_well_as_what_waits():
    requests = [Request([1] * 9, 3, (), 20), Request([2], 2, [5], stop_ids=(1, 2))]
    table = RowTable(shards=1)
    table.add([resolved(i, request, sampling()) for i, request in enumerate(requests)], None)
    waiting = demand_on(table, 8)
    assert waiting == Demand(
        longest_prompt=9,
        longest_completion=20,
        prompts=2,
        largest_group=3,
        completions=5,
        stop_ids=2,
        max_rows=8,
    )
    table.grow(rows=4, prompt_slots=2, lanes=4)
    table.admit()
    assert demand_on(table, 8) == waiting
    for row in range(3):
        table.retire(row)
    assert demand_on(table, 8) == Demand(2, 16, 1, 2, 2, 2, 8)


def test_sizes_that_grow_have_room_for_what_was_there():
    before, added = sizes_for(groups(8, 2), slots=8), sizes_for(groups(2, 16), slots=32)
    assert (before.rows, before.prompts, before.lanes) == (8, 8, 2)
    assert (added.rows, added.prompts, added.lanes) == (32, 2, 16)
    assert grown(before, groups(2, 16), slots=32) == grown(added, groups(8, 2), slots=8)
    both = grown(before, groups(2, 16), slots=32)
    assert (both.rows, both.prompts, both.lanes) == (32, 8, 16)


def test_sizes_that_grow_stay_within_memory():
    """A MiB holds 16 tokens: 16 rows of 40, and 16 prompts of 32, take 72 MiB."""
    before = sizes_for(groups(16, 1), LARGE, slots=32, cache_mib=72)
    assert (before.rows, before.prompts) == (16, 16)
    more, longer = groups(32, 1), groups(1, 1, length=33)
    assert grown(before, more, LARGE, slots=32, cache_mib=72) == before
    assert grown(before, more, LARGE, slots=32, cache_mib=300).rows == 32
    assert grown(before, longer, LARGE, cache_mib=72) is None
    assert grown(before, [Request([1], 1, (), 33)], LARGE, cache_mib=72) is None
    assert grown(before, longer, LARGE, cache_mib=104).prompt_capacity == 64


def test_memory_holds_the_sizes():
    """Rows grow with the budget."""
    rows = []
    for mib in (25, 60, 100, 200, 400, 800):
        made = sizes_for(groups(64, 4, length=100), LARGE, max_new_tokens=200, cache_mib=mib)
        own, prompt = made.rows * (256 + 8), made.prompts * 128
        assert (own + prompt) * 64 / 1024 <= mib
        rows.append(made.rows)
    assert rows == sorted(rows) and rows[0] == 1 and len({*rows}) > 3


@pytest.mark.parametrize(
    ("cache_mib", "rows"),
    [(5_000, 56), (900, 28), (560, 28), (400, 20), (300, 12), (200, 8)],
)
def test_rows_that_do_not_fit_at_once_take_even_turns(cache_mib, rows):
    """A row takes 16.5 MiB, so for 56 completions 560 hold 28 beside 8 prompts, and 400 hold 20."""
    requests = groups(8, 7, length=100)
    made = sizes_for(requests, LARGE, slots=64, max_new_tokens=200, cache_mib=cache_mib)
    assert made.rows == rows


class Device:
    """Half of its 2 GiB are in use."""

    def memory_stats(self):
        return {"bytes_limit": 2**31, "bytes_in_use": 2**30}


@pytest.fixture
def known_memory(monkeypatch):
    monkeypatch.setattr(exchange.jax, "local_devices", lambda: [Device(), Device()])


def test_all_processes_size_for_the_least_memory_of_any(monkeypatch, known_memory):
    """Here another one has 50 MiB; what is agreed on is a maximum, of negative numbers."""
    args = groups(64, 4, length=100), LARGE
    least = sizes_for(*args, max_new_tokens=200, cache_mib=40)  # 80%
    assert exchange.least_mib_left() == 1024
    assert sizes_for(*args, max_new_tokens=200).rows > least.rows
    monkeypatch.setattr(exchange, "largest_of_processes", lambda left: (max(left, -50),))
    assert sizes_for(*args, max_new_tokens=200) == least


def test_bfloat16_takes_half():
    sizes = [
        sizes_for(groups(64, 4), LARGE, slots=256, cache_mib=200, dtype=dtype).rows
        for dtype in ("float32", "bfloat16")
    ]
    assert 1.8 <= sizes[1] / sizes[0] <= 2.5


def test_the_longest_limit_counts_whoever_has_it():
    short, long = groups(40, 1), [*groups(39, 1), Request([99], 1, (), 900)]
    rows = [sizes_for(r, LARGE, slots=64, cache_mib=500).rows for r in (short, long)]
    assert rows[0] == 40 > rows[1]


def test_no_room_for_one_row_is_refused_with_the_numbers():
    with pytest.raises(
        UsageError,
        match="one prompt of 100 tokens and one completion of 200 takes 24.5 MiB, more than the 20",
    ):
        sizes_for(groups(2, 1, length=100), LARGE, max_new_tokens=200, segment=8, cache_mib=20)
