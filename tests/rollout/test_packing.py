"""Where prompts stand in packed rows, and what is told of them."""

import numpy as np
import pytest

from srft_jax.rollout.packing import pack_prompts
from srft_jax.rollout.row_table import PrefillJob, PromptEntry


def jobs(lengths, num_forced=0, shards=1, temperature=1.0):
    """Token ids count on from prompt to prompt, so that each occurs once."""
    ends = np.cumsum(lengths)
    prompts = [
        PromptEntry((*range(end - length, end),), num_forced, temperature)
        for length, end in zip(lengths, ends, strict=True)
    ]
    return [PrefillJob(i % shards, i // shards, prompt) for i, prompt in enumerate(prompts)]


def packed(wanted, shards=1, with_forced=False):
    longest = max(len(job.prompt.tokens) for job in wanted)
    return list(
        pack_prompts(
            wanted, shards=shards, num_prompt_slots=40, longest=longest, with_forced=with_forced
        )
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_every_prompt_stands_where_its_place_says(shards):
    wanted = jobs([5, 30, 3, 20, 9, 1, 12], shards=shards)
    found = []
    for prompts, packed_at in packed(wanted, shards):
        rows_of_shard = prompts.tokens.shape[0] // shards
        numbers = np.reshape(np.stack([*vars(prompts.writes).values()]), (4, shards, -1))
        for shard in range(shards):
            used = numbers[:, shard, : (numbers[2, shard] > 0).sum()]
            assert (numbers[3, shard, used.shape[1] :] == np.iinfo(np.int32).max).all()
            for row, start, length, slot in used.T:
                where = (shard * rows_of_shard + row, slice(start, start + length))
                assert prompts.positions[where].tolist() == [*range(length)]
                assert len({*prompts.segment_ids[where]}) == 1
                found.append((shard, slot, tuple(prompts.tokens[where])))
        # What the host is told is the same.
        for entry in packed_at:
            tokens = prompts.tokens[entry.row, entry.start :][: len(entry.job.prompt.tokens)]
            assert tuple(tokens) == entry.job.prompt.tokens
        assert (prompts.segment_ids > 0).sum() == sum(
            len(entry.job.prompt.tokens) for entry in packed_at
        )
        for row in prompts.segment_ids:
            inside = row[row > 0]
            assert (np.diff(inside) >= 0).all() and len({*inside}) == max(inside, default=0)
    assert sorted(found) == sorted((p.shard, p.prompt_slot, p.prompt.tokens) for p in wanted)


def test_shapes_are_bounded_by_what_is_used_and_few():
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(200):
        lengths = [150, *rng.integers(1, 190, rng.integers(0, 39))]
        passes = [prompts for prompts, _ in packed(jobs(lengths))]
        used = sum(prompts.tokens.size for prompts in passes)
        assert used <= 1.5 * sum(lengths) + 2 * 192
        shapes |= {(prompts.tokens.shape, prompts.writes.row.shape) for prompts in passes}
    assert shapes == {((rows, 192), (40,)) for rows in (1, 4, 16)}


def test_prompts_of_very_different_lengths_do_not_pad_to_the_longest():
    """104 tokens in 128 places."""
    passes = packed(jobs([60, *[2] * 22]))
    assert [prompts.tokens.shape for prompts, _ in passes] == [(1, 64), (1, 64)]


def test_many_prompts_take_several_passes():
    """8192 tokens at once."""
    wanted = jobs([32 * length for length in (60, 50, 64, 40, 61, 62, 3, 2)])
    passes = packed(wanted)
    assert [prompts.tokens.shape for prompts, _ in passes] == [(4, 2048), (1, 2048), (1, 2048)]
    seen = [entry.job for _, packed_at in passes for entry in packed_at]
    assert sorted(p.prompt_slot for p in seen) == [*range(8)]


def test_a_shard_without_a_new_prompt_goes_along():
    ((prompts, packed_at),) = packed(jobs([4]), shards=2)
    assert prompts.tokens.shape == (2, 32) and len(packed_at) == 1
    assert not prompts.segment_ids[1].any()
    assert prompts.writes.prompt_slot.tolist() == [0] + 79 * [np.iinfo(np.int32).max]


def test_forced_tokens_are_targets_of_the_tokens_before_them():
    wanted = [*jobs([6], num_forced=2), *jobs([3])]
    ((prompts, packed_at),) = packed(wanted, with_forced=True)
    targets = {p.start: prompts.forced[0, p.start :][:6].tolist() for p in packed_at}
    assert targets == {0: [-1, -1, -1, 4, 5, -1], 6: [-1] * 6}
    ((prompts, _),) = packed(wanted)
    assert prompts.forced is None and prompts.temperatures is None


def test_forced_tokens_are_scored_at_their_own_temperature():
    """Greedy ones at 1, as what a greedy completion draws."""
    warm, greedy = jobs([6], 2, temperature=0.7), jobs([3], 1, temperature=0.0)
    ((prompts, _),) = packed([*warm, *greedy], with_forced=True)
    np.testing.assert_allclose(prompts.temperatures[0, :9], [0.7] * 6 + [1.0] * 3)
