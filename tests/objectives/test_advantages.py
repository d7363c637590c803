"""Group advantages in closed form."""

import numpy as np
import pytest

from srft_jax.objectives.advantages import group_advantages, overlong_penalty

SETTINGS = [dict(augmented=a, divide_by_std=s) for a in (False, True) for s in (False, True)]


@pytest.mark.parametrize("correct", range(8))
def test_one_correct_demonstration_and_seven_rollouts(correct):
    completions, demo = group_advantages(
        [1.0] * correct + [0.0] * (7 - correct), [1.0], augmented=True, divide_by_std=False
    )
    np.testing.assert_allclose(demo, [(7 - correct) / 8], rtol=1e-6)
    np.testing.assert_allclose(completions[:correct], (7 - correct) / 8, rtol=1e-6)
    np.testing.assert_allclose(completions[correct:], -(correct + 1) / 8, rtol=1e-6)
    assert completions.dtype == demo.dtype == np.float32


def test_std_has_one_degree_of_freedom_less():
    """Rewards 1, 0, 0, 1: mean 1/2, variance 4 * 1/4 / 3; alone 1, 0, 0: mean 1/3, variance 1/3."""
    completions, demo = group_advantages([1, 0, 0], [1], augmented=True, divide_by_std=True)
    np.testing.assert_allclose(completions, np.array([1, -1, -1]) * 0.75**0.5, rtol=1e-5)
    np.testing.assert_allclose(demo, [0.75**0.5], rtol=1e-5)
    completions, demo = group_advantages([1, 0, 0], [1], augmented=False, divide_by_std=True)
    np.testing.assert_allclose(completions, np.array([2, -1, -1]) / 3**0.5, rtol=1e-5)
    np.testing.assert_allclose(demo, [2 / 3**0.5], rtol=1e-5)


def test_epsilon_is_added_to_the_std():
    completions, _ = group_advantages([1e-6, 0.0], [], augmented=False, divide_by_std=True)
    std = 1e-6 / 2**0.5
    np.testing.assert_allclose(completions, np.array([5e-7, -5e-7]) / (std + 1e-6), rtol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_equal_rewards_have_no_advantage(settings):
    for completions, demonstrations in [([1, 1, 1], [1]), ([0.1] * 7, [0.1]), ([0.3], [])]:
        results = group_advantages(completions, demonstrations, **settings)
        assert [len(x) for x in results] == [len(completions), len(demonstrations)]
        assert not any(np.any(x) for x in results)


@pytest.mark.parametrize("settings", SETTINGS)
def test_groups_without_rollouts_or_demonstrations(settings):
    for completions, demonstrations in [([], []), ([], [1]), ([1, 0], [])]:
        results = group_advantages(completions, demonstrations, **settings)
        assert [len(x) for x in results] == [len(completions), len(demonstrations)]
        assert np.all(np.isfinite(np.concatenate(results)))
    assert results[0][0] > 0 > results[0][1]


def baseline_advantages(rewards, baseline, divide_by_std=False):
    completions, demonstrations = group_advantages(
        rewards, [], augmented=False, divide_by_std=divide_by_std, baseline=baseline
    )
    assert demonstrations.shape == (0,)
    return completions


def test_prefixed_completions_do_not_count_for_the_mean():
    """A right completion with a prefix keeps A = 1 beside wrong ones without."""
    np.testing.assert_array_equal(baseline_advantages([1, 0, 0], [False, True, True]), [1, 0, 0])
    advantages = baseline_advantages([1, 1, 0, 0, 0], [False, True, True, True, True])
    np.testing.assert_allclose(advantages, [0.75, 0.75, -0.25, -0.25, -0.25])
    advantages = baseline_advantages([0, 1, 0], [False, True, True], divide_by_std=True)
    np.testing.assert_allclose(advantages, np.array([-0.5, 0.5, -0.5]) / 0.5**0.5, rtol=1e-5)


def test_a_baseline_without_spread_or_without_completions():
    np.testing.assert_array_equal(
        baseline_advantages([1, 0, 0], [False, True, True], True), [0, 0, 0]
    )
    np.testing.assert_array_equal(baseline_advantages([1, 0], [False, False]), [0, 0])
    np.testing.assert_array_equal(baseline_advantages([1, 1, 1], [False, True, True]), [0, 0, 0])
    everything = group_advantages([1, 0], [1], augmented=True, divide_by_std=True)
    counted = group_advantages(
        [1, 0], [1], augmented=True, divide_by_std=True, baseline=[True, True]
    )
    for a, b in zip(everything, counted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (120, -1)]
)
def test_overlong_penalty(length, penalty):
    np.testing.assert_allclose(overlong_penalty(length, 100, 0.2), penalty, atol=1e-9)


def test_no_buffer_no_penalty():
    assert not any(overlong_penalty(length, 100, 0.0) for length in (1, 99, 100))
