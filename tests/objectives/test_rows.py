"""Sequences to packed rows: every token once, on its place, counted in the right normaliser."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sequences import made_sequence

from srft_jax.batch import Role
from srft_jax.config import ObjectiveConfig, TrainingConfig
from srft_jax.objectives.methods import expand
from srft_jax.objectives.rows import (
    make_batch,
    max_microbatches,
    pack,
)

EOS = 9
NONE, SELF, DEMO, HINT, PREFIX = Role
TRAINING = TrainingConfig(row_length=10, rows_per_microbatch=2)
SRFT = expand(ObjectiveConfig())
thorough = settings(deadline=None, derandomize=True, database=None)


def batch_of(sequences, num_microbatches=4, objective=SRFT, training=TRAINING, length_cap=8):
    return make_batch(
        sequences, objective, training, num_microbatches=num_microbatches, length_cap=length_cap
    )


def sequence(prompt_length, completion_length, role=SELF, number=0):
    """Tokens that say where they are from: 100 * number + index, EOS last; log-probs -token."""
    tokens = 100 * number + np.arange(1, prompt_length + completion_length + 1)
    tokens[-1] = EOS
    completion = tokens[prompt_length:].tolist()
    old = [-float(token) for token in completion] if role == SELF else None
    return made_sequence(
        tokens[:prompt_length].tolist(), completion, role, 0.5 - number, number % 2 == 0, old
    )


@st.composite
def ragged(draw):
    """A few sequences that fit rows of 10."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=12))
    roles = [draw(st.sampled_from([SELF, DEMO])) for _ in sizes]
    return [
        sequence(*size, role, n) for n, (size, role) in enumerate(zip(sizes, roles, strict=True))
    ]


def test_the_worked_example():
    """Prompt 1 2 3 4, completion 5 EOS, as in the docstring of `Rows`; after it a demonstration."""
    first = made_sequence([1, 2, 3, 4], [5, EOS], SELF, 0.5, True, [-0.1, -0.2], 0.3)
    second = made_sequence([6], [7, EOS], DEMO, -0.5, False)
    batch = batch_of([first, second], num_microbatches=1)
    rows = {f.name: getattr(batch.rows, f.name)[0, 0] for f in dataclasses.fields(batch.rows)}
    expected = dict(
        tokens=[1, 2, 3, 4, 5, 6, 7, 0, 0, 0],
        targets=[2, 3, 4, 5, EOS, 7, EOS, 0, 0, 0],
        positions=[0, 1, 2, 3, 4, 0, 1, 0, 0, 0],
        segment_ids=[1, 1, 1, 1, 1, 2, 2, 0, 0, 0],
        sequence_ids=[0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
        role=[0, 0, 0, 1, 1, 2, 2, 0, 0, 0],
        loss_mask=[0, 0, 0, 1, 1, 1, 1, 0, 0, 0],
        advantage=[0.5] * 5 + [-0.5] * 2 + [0] * 3,
        correct=[1] * 5 + [0] * 5,
        weight=np.float32([0.3] * 5 + [1] * 2 + [0] * 3),
        old_logprobs=np.float32([0, 0, 0, -0.1, -0.2, 0, 0, 0, 0, 0]),
        sampler_logprobs=np.float32([0, 0, 0, -0.1, -0.2, 0, 0, 0, 0, 0]),
        inverse_length=[0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0],
    )
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(rows[name], values, err_msg=name)
    assert rows["tokens"].dtype == np.int32 and rows["loss_mask"].dtype == bool
    assert batch.num_microbatches == 1


def stretches(rows):
    """The slots [T] of each sequence as (microbatch, row, slots), from sequence_ids alone."""
    for m, microbatch in enumerate(rows.sequence_ids):
        occupied = rows.segment_ids[m] > 0
        numbers = sorted(set(microbatch[occupied]))
        assert numbers == list(range(len(numbers)))
        for number in numbers:
            where = occupied & (microbatch == number)
            (row,) = set(np.nonzero(where)[0])  # never split over rows
            yield m, row, where[row]


@thorough
@given(ragged())
def test_every_sequence_stands_in_the_rows_once(sequences):
    batch = batch_of(sequences, num_microbatches=6)
    rows, originals = batch.rows, {s.prompt[0]: s for s in sequences}
    assert len(originals) == len(sequences)
    for m, row, slots in stretches(rows):
        assert m < batch.num_microbatches
        tokens, targets = rows.tokens[m, row, slots], rows.targets[m, row, slots]
        original = originals.pop(tokens[0])
        assert [*tokens, EOS] == [*original.prompt, *original.trajectory.tokens]
        assert [*tokens[1:], EOS] == targets.tolist()
        assert (
            targets[rows.loss_mask[m, row, slots]].tolist() == original.trajectory.tokens.tolist()
        )
        assert len(set(rows.segment_ids[m, row, slots])) == 1
        assert set(rows.role[m, row, slots][rows.loss_mask[m, row, slots]]) == {original.role}
    assert not originals
    assert not np.any(rows.loss_mask & (rows.segment_ids == 0))


def test_eos_is_trained_and_padding_is_not():
    batch = batch_of([sequence(2, 3), sequence(1, 1, DEMO, 1)])
    rows = batch.rows
    assert (rows.targets[rows.loss_mask] == EOS).sum() == 2
    assert rows.loss_mask.sum() == 4
    assert not np.any(rows.loss_mask & (rows.segment_ids == 0))


@thorough
@given(ragged())
def test_old_logprobs_lie_on_their_tokens(sequences):
    rows = batch_of(sequences, num_microbatches=6).rows
    own = rows.loss_mask & (rows.role == SELF)
    not_eos = own & (rows.targets != EOS)
    np.testing.assert_array_equal(rows.old_logprobs[not_eos], -rows.targets[not_eos])
    np.testing.assert_array_equal(rows.old_logprobs[own & ~not_eos], -EOS)
    assert not np.any(rows.old_logprobs[~own])
    np.testing.assert_array_equal(rows.sampler_logprobs, rows.old_logprobs)


def test_a_completion_with_a_forced_start():
    """Two prefix tokens, one of them not trained, then two of its own; and one with a hint."""
    first = made_sequence([1], [2, 3, 4, EOS], [NONE, PREFIX, SELF, SELF], 1.0, True, [-4] * 4)
    second = made_sequence([1], [2, 3, 4, EOS], [HINT, HINT, HINT, SELF], 1.0, True, [-4] * 4)
    rows = batch_of([first, second], num_microbatches=1).rows
    np.testing.assert_array_equal(rows.role[0, 0, :8], [0, 4, 1, 1, 3, 3, 3, 1])
    np.testing.assert_array_equal(rows.loss_mask[0, 0, :8], [0, 1, 1, 1, 1, 1, 1, 1])
    third = np.float32(1 / 3)
    np.testing.assert_array_equal(rows.inverse_length[0, 0, :8], [0] + [third] * 6 + [1])
    np.testing.assert_array_equal(rows.sampler_logprobs[0, 0, :8], [0] + [-4] * 7)


def test_logprobs_of_who_wrote_a_demonstration_are_not_the_samplers():
    known = made_sequence([1], [2, EOS], DEMO, 1.0, True, [-1.0, -2.0])
    rows = batch_of([known], num_microbatches=1).rows
    np.testing.assert_array_equal(rows.old_logprobs[0, 0, :2], [-1, -2])
    assert not np.any(rows.sampler_logprobs)


def test_old_logprobs_of_another_length_are_an_error():
    right = sequence(2, 3)
    trajectory = dataclasses.replace(right.trajectory, logprobs=np.float32([-0.1, -0.2]))
    wrong = dataclasses.replace(right, trajectory=trajectory)
    with pytest.raises(ValueError, match="2 input values to the 3"):
        batch_of([wrong])


def test_pack_takes_the_fullest_row_with_room_longest_first():
    assert pack([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert pack([6, 7, 3], 10) == [[1, 2], [0]]
    assert pack([3, 6, 4, 2], 8) == [[1, 3], [2, 0]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([4, 6, 3, 3, 4], 10) == [[1, 0], [4, 2, 3]]
    assert pack([], 10) == []


@pytest.mark.parametrize("row_length", [9216, 16384])
def test_rows_of_long_tailed_lengths_are_full(row_length):
    """A step of 128 prompts: seven rollouts of around 1.5k tokens and a demonstration of 4k."""
    random = np.random.default_rng(0)
    means = np.tile([1500] * 7 + [4000], 128)
    answers = random.lognormal(np.log(means) - 0.4, 0.9).clip(1, 8192)
    lengths = (200 + answers).astype(int)
    rows = pack(lengths.tolist(), row_length)
    assert sorted(index for row in rows for index in row) == list(range(1024))
    assert max(lengths[row].sum() for row in rows) <= row_length
    assert lengths.sum() > 0.99 * len(rows) * row_length
    assert lengths.sum() < 0.3 * 1024 * lengths.max()  # what padding to the longest would give


def test_a_sequence_longer_than_a_row_is_an_error():
    assert pack([10], 10) == [[0]]
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        pack([4, 11], 10)
    assert batch_of([sequence(5, 6)]).num_microbatches == 1  # the last token is a target only
    with pytest.raises(ValueError, match="11 tokens"):
        batch_of([sequence(5, 7)])


def test_too_few_microbatches_are_an_error():
    five_rows = [sequence(5, 6, number=n) for n in range(5)]
    assert batch_of(five_rows, num_microbatches=3).num_microbatches == 3
    with pytest.raises(ValueError, match="5 rows need 3 microbatches of 2 there are"):
        batch_of(five_rows, num_microbatches=2)


@thorough
@given(
    lengths=st.lists(st.integers(1, 10), min_size=1, max_size=60),
    row_length=st.integers(10, 40),
    rows=st.integers(1, 4),
)
def test_max_microbatches_is_a_bound(lengths, row_length, rows):
    training = TrainingConfig(row_length=row_length, rows_per_microbatch=rows)
    needed = -(-len(pack(lengths, row_length)) // rows)
    assert needed <= max_microbatches(len(lengths), 10, training)


def test_max_microbatches_is_reached():
    """Rows of 29 hold two sequences of 10, not three."""
    training = TrainingConfig(row_length=29, rows_per_microbatch=3)
    for number, expected in [(1, 1), (6, 1), (7, 2), (12, 2), (13, 3)]:
        assert max_microbatches(number, 10, training) == expected
        assert -(-len(pack([10] * number, 29)) // 3) == expected
