import json
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from srft_jax.config import UsageError
from srft_jax.data.examples import Example
from srft_jax.data.pipeline import NO_DEMONSTRATION, prompt_batches


def make_examples(count):
    """Example i has i % 4 demonstrations."""
    return [Example(str(i), "1", ("d",) * (i % 4)) for i in range(count)]


def take(iterator, count):
    """[count, 2, P]: indices of examples and demonstrations."""
    batches = [next(iterator) for _ in range(count)]
    return np.stack([np.stack([batch.example, batch.demonstration]) for batch in batches])


def epochs(count, size, seed, num_epochs):
    """[num_epochs, count]: the order of the examples, read in batches of `size`."""
    batches = take(prompt_batches(make_examples(count), size, seed), num_epochs * count // size)
    return batches[:, 0].reshape(num_epochs, count)


@pytest.mark.parametrize("size", [1, 5, 6, 15])
def test_every_epoch_holds_every_example_once_in_an_order_of_its_own(size):
    """30 examples; batches of 15 end with the epoch, and so do those of the other sizes."""
    orders = epochs(30, size, seed=0, num_epochs=4)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(30), (4, 1)))
    assert len({tuple(order) for order in orders.tolist()} | {tuple(range(30))}) == 5


def test_epochs_are_complete_when_batches_straddle_them():
    """14 batches of 5 are 7 epochs of 10 and also 10 of 7: no example is dropped at the seam."""
    orders = take(prompt_batches(make_examples(7), 5, 3), 14)[:, 0].reshape(10, 7)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(7), (10, 1)))


def test_order_follows_the_seed():
    assert np.array_equal(epochs(30, 6, 0, 2), epochs(30, 6, 0, 2))
    assert not np.array_equal(epochs(30, 6, 0, 2), epochs(30, 6, 1, 2))
    # Not the same orders one epoch later either.
    assert not np.array_equal(epochs(30, 6, 0, 2)[1], epochs(30, 6, 1, 2)[0])


def test_the_order_does_not_depend_on_the_batch_size():
    assert np.array_equal(epochs(30, 5, 0, 2), epochs(30, 6, 0, 2))


def test_demonstrations_are_drawn_among_those_there_are():
    example, demonstration = take(prompt_batches(make_examples(8), 8, 0), 40).transpose(1, 0, 2)
    for index in range(8):
        drawn = set(demonstration[example == index].tolist())
        count = index % 4
        assert drawn == (set(range(count)) if count else {NO_DEMONSTRATION})


def test_examples_with_a_demonstration_alone():
    """24 of 32, their indices those of the whole set; an epoch is four batches of six."""
    iterator = prompt_batches(make_examples(32), 6, 0, demonstrated=True)
    example, demonstration = take(iterator, 8).transpose(1, 0, 2)
    expected = [index for index in range(32) if index % 4]
    for epoch in example.reshape(2, 24):
        assert sorted(epoch.tolist()) == expected
    assert (demonstration >= 0).all() and (demonstration < example % 4).all()


def test_pairs_of_example_and_demonstration():
    batch = next(prompt_batches(make_examples(30), 6, 0))
    expected = [[i, n] for i, n in zip(batch.example, batch.demonstration, strict=True)]
    assert [list(pair) for pair in batch.pairs()] == expected
    assert all(type(number) is int for pair in batch.pairs() for number in pair)


def test_batches_are_indices():
    batch = next(prompt_batches(make_examples(30), 6, 0))
    assert batch.example.shape == batch.demonstration.shape == (6,)
    assert batch.example.dtype == batch.demonstration.dtype == np.int32


@pytest.mark.parametrize("offset", [0, 1, 4, 5, 6, 13])
def test_a_restored_iterator_continues_bit_exactly(offset):
    """An epoch of 23 is 4.6 steps of 5: the offsets stand before, on and behind its seams."""
    uninterrupted = prompt_batches(make_examples(23), 5, 7)
    take_or_nothing = [next(uninterrupted) for _ in range(offset)]
    assert len(take_or_nothing) == offset
    state = json.loads(json.dumps(uninterrupted.get_state()))
    restored = prompt_batches(make_examples(23), 5, 7)
    restored.set_state(state)
    assert np.array_equal(take(restored, 9), take(uninterrupted, 9))


def test_state_can_be_set_back():
    iterator = prompt_batches(make_examples(23), 5, 7)
    state = iterator.get_state()
    first = take(iterator, 6)
    iterator.set_state(state)
    assert np.array_equal(take(iterator, 6), first)


def test_it_is_saved_and_restored_by_an_orbax_manager(tmp_path):
    saved = prompt_batches(make_examples(23), 5, 7)
    take(saved, 6)
    state = {"w": jnp.arange(3.0)}
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        data = grain.checkpoint.CheckpointSave(saved)
        manager.save(6, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=data))
        expected = take(saved, 5)  # while the checkpoint is still being written
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        data = grain.checkpoint.CheckpointRestore(prompt_batches(make_examples(23), 5, 7))
        target = ocp.args.StandardRestore(jax.eval_shape(lambda: state))
        restored = manager.restore(6, args=ocp.args.Composite(state=target, data=data))
    assert np.array_equal(take(restored.data, 5), expected)


MIXED = [Example(f"{n}", "1", ("d",), source=int(n >= 8)) for n in range(20)]  # 8 and 12 rows


def test_sources_take_turns_by_their_weights():
    """Whatever their sizes, at every moment; each goes through epochs of its own."""
    batches = take(prompt_batches(MIXED, 4, 0, weights=(3, 1)), 24)[:, 0]
    assert ((batches >= 8).sum(axis=1) == 1).all()
    first, second = batches[batches < 8].reshape(-1, 8), batches[batches >= 8].reshape(-1, 12)
    assert (len(first), len(second)) == (9, 2)
    assert (np.sort(first, axis=1) == np.arange(8)).all()
    assert (np.sort(second, axis=1) == np.arange(8, 20)).all()
    assert len({tuple(order) for order in first.tolist()}) > 7


def test_weights_are_relative():
    batches = [
        take(prompt_batches(MIXED, 5, 0, weights=weights), 8)
        for weights in ((0.75, 0.25), (3, 1), (1, 1))
    ]
    assert np.array_equal(batches[0], batches[1]) and not np.array_equal(batches[0], batches[2])


def test_equally_large_sources_are_shuffled_apart():
    twins = [Example(f"{n}", "1", source=n // 10) for n in range(20)]
    orders = take(prompt_batches(twins, 20, 0, weights=(1, 1)), 1)[0, 0]
    assert not np.array_equal(orders[orders < 10], orders[orders >= 10] - 10)


def test_a_source_without_a_demonstration_is_left_out():
    examples = [Example(f"{n}", "1", ("d",) * (n < 8), source=int(n >= 8)) for n in range(20)]
    iterator = prompt_batches(examples, 8, 0, demonstrated=True, weights=(1, 5))
    assert sorted(take(iterator, 1)[0, 0]) == list(range(8))


@pytest.mark.parametrize("weights", [(1, 0), (1, -1), (1, float("nan"))])
def test_weights_are_above_zero(weights):
    with pytest.raises(UsageError, match="weights of a mixture are above 0, got"):
        prompt_batches(MIXED, 4, 0, weights=weights)


@pytest.mark.parametrize("offset", [0, 1, 5, 7])
def test_a_restored_mixture_continues_bit_exactly(offset):
    """Epochs of 8 and 12 end within batches of 5, or with them."""
    uninterrupted = prompt_batches(MIXED, 5, 7, weights=(2, 1))
    for _ in range(offset):
        next(uninterrupted)
    restored = prompt_batches(MIXED, 5, 7, weights=(2, 1))
    restored.set_state(json.loads(json.dumps(uninterrupted.get_state())))
    assert np.array_equal(take(restored, 4), take(uninterrupted, 4))


def test_no_threads_are_started():
    before = threading.active_count()
    take(prompt_batches(make_examples(30), 6, 0), 3)
    assert threading.active_count() == before


@pytest.mark.parametrize("size", [0, 31])
def test_batches_that_cannot_be_filled(size):
    with pytest.raises(UsageError, match=f"between 1 and the 30 training examples, got {size}"):
        prompt_batches(make_examples(30), size, 0)


def test_too_few_examples_with_a_demonstration():
    with pytest.raises(UsageError, match="22 training examples with a demonstration, got 23"):
        prompt_batches(make_examples(30), 23, 0, demonstrated=True)


def test_a_negative_seed():
    with pytest.raises(UsageError, match="seed is at least 0, got -1"):
        prompt_batches(make_examples(30), 6, -1)
