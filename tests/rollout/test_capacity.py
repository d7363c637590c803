"""The cache follows the length that is used; what is drawn does not notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_models import (
    CONFIG,
    KEY,
    PARAMS,
    PROMPTS,
    assert_same,
    capacity,
    complete,
    sampling,
    watched,
)

from srft_jax.config import UsageError
from srft_jax.rollout import Request, sample_stream
from srft_jax.rollout.cache import CacheShape, empty_cache, settle

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Longest first: the first row of two gives its place to short ones, then the second does.
LIMITS = (200, 100, 33, 1, 24, 7, 40, 8, 9, 16)


@pytest.fixture(scope="module")
def at_once():
    """All rows side by side in one segment, which needs no cache but the recent part."""
    return complete(long_tailed(), slots=16, segment=200, max_new_tokens=200)


def long_tailed():
    return [Request(PROMPTS[i % 4], 1, (), n) for i, n in enumerate(LIMITS)]


@pytest.mark.slow
def test_a_cache_that_grows_and_shrinks_changes_nothing(at_once):
    """Long-tail limits in two rows, ten times as many completions, segments of eight."""
    in_turns, capacities = watched(long_tailed(), capacity, slots=2, max_new_tokens=200)
    assert_same(in_turns, at_once)
    assert max(capacities) >= 200
    assert {0, 32, 64, 128} <= {*capacities}, "in steps"
    steps = np.sign(np.diff(capacities))
    assert {1, -1} <= {*steps.tolist()}
    assert at_once[0][0].tokens.size == 200 and len({c.tokens.size for (c,) in at_once}) > 5


def test_what_is_settled_stands_behind_what_was_there():
    """Against slices by NumPy, with room for all of the recent part or only for what is used."""
    rows, capacity, segment, used = 40, 12, 8, 5
    rng = np.random.default_rng(0)
    lengths = rng.integers(used, capacity + 1, rows)
    cache = empty_cache(CONFIG, CacheShape(rows, 1, 1, 1, capacity, segment), "float32")
    drawn = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), cache)
    cache = dataclasses.replace(
        drawn, lengths=jnp.asarray(lengths, jnp.int32), num_recent=jnp.int32(used)
    )
    settled = jax.jit(settle)(cache)
    for row, end in enumerate(lengths):
        start = end - used
        for layer in range(CONFIG.num_layers):
            keys, values = cache.keys[layer][row], cache.values[layer][row]
            new_keys, new_values = cache.recent_keys[layer][row], cache.recent_values[layer][row]
            np.testing.assert_array_equal(
                settled.keys[layer][row, ..., :end],
                np.concatenate([keys[..., :start], new_keys[..., :used]], axis=-1),
            )
            np.testing.assert_array_equal(
                settled.values[layer][row, :, :end],
                np.concatenate([values[:, :start], new_values[:, :used]], axis=1),
            )


def test_a_row_needs_room_for_its_own_tokens_only():
    """Segments of eight that end early: 28 tokens and the unused end of a segment exceed 32."""
    requests = [Request(PROMPTS[i % 4], 1, (), n) for i, n in enumerate((32, 25, 3, 3, 3))]
    at_once = complete(requests, slots=8, segment=32, max_new_tokens=32)
    in_turns, capacities = watched(requests, capacity, slots=2, max_new_tokens=32)
    assert_same(in_turns, at_once)
    assert set(capacities) == {0, 32} and any(len(c.tokens) == 32 for (c,) in at_once)


@pytest.mark.slow
def test_less_memory_is_fewer_rows_and_the_same_completions():
    """A token is 128 bytes, so a MiB holds 8192, 264 for each row: not 40 rows, but 20 twice."""
    requests = [Request(prompt, 10, (), 6) for prompt in PROMPTS]
    (at_once, rows), (in_turns, fewer_rows) = (
        watched(
            requests,
            lambda sampler: sampler.engine.sizes.rows,
            slots=40,
            max_new_tokens=256,
            cache_mib=mib,
        )
        for mib in (None, 1)
    )
    assert {*rows} == {40} and {*fewer_rows} == {20}
    assert_same(in_turns, at_once)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "request 0 has an empty prompt"),
        (Request([1, CONFIG.vocab_size]), f"ids from 1 to {CONFIG.vocab_size}, but the vocabulary"),
        (Request([1], forced=[-1]), "request 0 has token ids from -1 to 1"),
        (Request([1], group_size=-2), "request 0 asks for -2 completions"),
        (Request("7+5"), "prompt takes token ids"),
        (Request([1], stop_strings="a"), "stop_strings a list of texts"),
        (Request([1], stop_strings=["a", ""]), "request 0 has an empty stop string"),
        (Request([1], stop_strings=["a"]), "stop strings, which need a tokenizer"),
        (Request([1], forced=[2, 3], max_new_tokens=1), "may make 1 tokens but has 2 forced ones"),
    ],
)
def test_a_mistake_in_a_request_is_said_at_the_call(request_, message):
    with pytest.raises(UsageError, match=message):
        sample_stream(PARAMS, CONFIG, [request_], KEY, sampling())


def test_a_temperature_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="temperature nan is not 0 or more"):
        sampling(temperature=float("nan"))


def test_a_prompt_as_long_as_the_window_is_refused():
    window = CONFIG.max_positions
    with pytest.raises(
        UsageError, match=f"request 1 has a prompt of {window} tokens and may make 16 more, but "
    ):
        complete([Request([1]), Request([1] * window)])
    with pytest.raises(UsageError, match=f"has {window} positions"):
        complete([Request([1] * (window - 15))])
