"""Mixing weights, lengths of prefixes and the tokens chosen from them."""

import dataclasses

import numpy as np
import pytest

from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.schedules import longest_prefix, mix_weights, prefix_length, top_entropy

UFT, PREFIX_RFT = PRESETS["uft"], PRESETS["prefix_rft"]


def lengths(objective, step, num_tokens, draws=2000):
    rng = np.random.default_rng(0)
    return np.array([prefix_length(objective, step, num_tokens, rng) for _ in range(draws)])


def test_chord_mixes_along_a_cosine():
    for step, mu in [(0, 0.9), (100, 0.475), (200, 0.05), (1000, 0.05)]:
        np.testing.assert_allclose(mix_weights(PRESETS["chord"], step), (mu, 1 - mu))
    quarter = 0.05 + 0.85 * 0.5 * (1 + 0.5**0.5)
    np.testing.assert_allclose(mix_weights(PRESETS["chord"], 50)[0], quarter)


def test_constant_mixing_and_none():
    for step in (0, 7, 500):
        np.testing.assert_allclose(mix_weights(PRESETS["chord_phi"], step), (0.1, 0.9))
        assert mix_weights(PRESETS["srft"], step) == (1.0, 1.0)


@pytest.mark.parametrize(("step", "share"), [(0, 0.95), (150, 0.5), (299, 0.05)])
def test_uft_draws_chunks(step, share):
    """Binomial(5, share) chunks of 20 tokens each."""
    actual = lengths(UFT, step, 100)
    assert actual.max() <= longest_prefix(UFT, 100) == 99
    assert set(actual) <= {0, 20, 40, 60, 80, 99}
    np.testing.assert_allclose(np.minimum(actual, 99).mean(), 100 * share, atol=2.0)
    variance = 5 * share * (1 - share) * 20**2
    np.testing.assert_allclose(actual.var(), variance, rtol=0.2, atol=10)


def test_uft_ends_its_hints():
    assert lengths(UFT, 299, 100).any()
    assert not lengths(UFT, 300, 100).any()
    assert longest_prefix(dataclasses.replace(UFT, prefix_until=0), 100) == 0


@pytest.mark.parametrize(("step", "low"), [(0, 0.95), (250, 0.5), (499, 0.05)])
def test_prefix_rft_draws_uniformly_above_a_falling_bound(step, low):
    actual = lengths(PREFIX_RFT, step, 1000)
    assert (
        round(1000 * low) - 1 <= actual.min()
        and actual.max() <= longest_prefix(PREFIX_RFT, 1000) == 950
    )
    np.testing.assert_allclose(actual.mean(), 500 * (low + 0.95), rtol=0.03)
    np.testing.assert_allclose(actual.std(), 1000 * (0.95 - low) / 12**0.5, rtol=0.05, atol=1)
    assert not lengths(PREFIX_RFT, 500, 1000).any()


@pytest.mark.parametrize("objective", [UFT, PREFIX_RFT])
def test_a_token_is_left_to_generate(objective):
    whole = dataclasses.replace(objective, prefix_start=1.0, prefix_end=1.0)
    for num_tokens in (1, 2, 7):
        assert set(lengths(whole, 0, num_tokens, 20)) == {num_tokens - 1}


def test_no_prefix_of_a_preset_without_one():
    assert not lengths(PRESETS["grpo"], 0, 100, 20).any()


def test_the_same_generator_draws_the_same():
    np.testing.assert_array_equal(lengths(UFT, 100, 50, 20), lengths(UFT, 100, 50, 20))


def test_top_entropy_takes_a_share():
    actual = top_entropy([0.1, 2.0, 0.5, 0.3, 0.0], 0.4)
    assert actual.dtype == bool
    assert actual.tolist() == [False, True, True, False, False]
    assert top_entropy([0.2, 0.1], 0.2).tolist() == [True, False]  # at least one
    assert top_entropy(np.ones(15), 0.2).sum() == 3
    assert top_entropy([3.0, 1.0], 1.0).all()
    assert top_entropy([], 0.2).shape == (0,)
