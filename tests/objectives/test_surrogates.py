"""Surrogates, corrections and divergences one by one, most of them in no preset."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single_tokens import make_context, make_rows, values_and_gradients

from srft_jax.batch import Role
from srft_jax.config import ObjectiveConfig
from srft_jax.objectives.loss import importance_weight, log_ratio, ratio
from srft_jax.objectives.methods import expand
from srft_jax.objectives.surrogates import bounded_exp, clipped, is_clipped, kl_estimate
from srft_jax.ops.head import ReferencedStats, TokenStats


def grpo(**coefficients):
    return expand(ObjectiveConfig(preset="grpo", **coefficients))


def by_ratio(objective, ratios, advantage, **fields):
    """(loss, g) of tokens of p = .5 with these ratios."""
    logp = np.full(len(ratios), math.log(0.5))
    rows = make_rows(
        len(ratios),
        old_logprobs=(logp - np.log(ratios)).astype(np.float32),
        advantage=np.full(len(ratios), advantage, np.float32),
        **fields,
    )
    loss, by_logp, _ = values_and_gradients(objective, rows, logp, 0.0)
    return loss, -by_logp


def test_dual_clip_bounds_the_loss_of_bad_completions_only():
    ratios = np.array([0.5, 0.9, 2.0, 2.9, 3.1, 50.0])
    for advantage in (-0.5, -2.0):
        loss, g = by_ratio(grpo(dual_clip=3.0), ratios, advantage)
        value = -np.clip(ratios, 0.8, 3.0) * advantage
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        np.testing.assert_allclose(
            g, np.where((ratios > 0.8) & (ratios < 3), ratios * advantage, 0), rtol=1e-5
        )
    with_it, without = (by_ratio(grpo(dual_clip=c), ratios, 0.5) for c in (3.0, math.inf))
    np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("bounds", [dict(clip_low=0.0), dict(clip_high=0.0), {}])
def test_a_ratio_of_one_keeps_its_whole_gradient(bounds, advantage):
    """Also where the clip begins at 1: on policy every ratio is 1."""
    objective, a = grpo(**bounds), jnp.float32(advantage)
    assert jax.grad(lambda log_r: clipped(jnp.exp(log_r), a, objective))(0.0) == 1.0


def test_what_counts_as_clipped():
    ratios, a = jnp.array([0.1, 0.79, 1.0, 1.21, 4.0]), jnp.array([1.0, -1.0, 0.0])[:, None]
    low, high = is_clipped(ratios, a, grpo(dual_clip=3.0))
    np.testing.assert_array_equal(low, [[0] * 5, [1, 1, 0, 0, 0], [0] * 5])
    np.testing.assert_array_equal(high, [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0] * 5])
    low, high = is_clipped(ratios, a, grpo(surrogate="cispo"))  # on both sides for either sign
    np.testing.assert_array_equal(low, [[1, 1, 0, 0, 0]] * 2 + [[0] * 5])
    np.testing.assert_array_equal(high, [[0, 0, 0, 1, 1]] * 2 + [[0] * 5])


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    ratios = np.array([0.5, 1.0, 9.0])
    for advantage in (1.0, -2.0):
        _, g = by_ratio(grpo(surrogate="cispo", clip_high=5.0), ratios, advantage)
        np.testing.assert_allclose(g, np.array([0.8, 1.0, 6.0]) * advantage, rtol=1e-5)


def test_the_ratio_of_gspo_is_the_sequences():
    """Three tokens of one sequence, of which a hint does not count, and one of another.

    Each token's gradient is its own loss: only where weights differ can it be told from a gradient
    that is shared out among the sequence's tokens.
    """
    objective = expand(
        ObjectiveConfig(preset="gspo", clip_low=0.2, clip_high=0.2, old_logprobs="trainer")
    )
    log_r, log_weight = jnp.array([0.3, -0.1, 5.0, 0.05]), jnp.array([0.2, 0.0, 0.0, 0.1])
    rows = make_rows(
        4,
        jnp.array([Role.SELF, Role.SELF, Role.HINT, Role.SELF]),
        sequence_ids=[0, 0, 0, 1],
        old_logprobs=-1.0 - log_r,
        sampler_logprobs=-1.0 - log_r - log_weight,
    )
    logp, context = jnp.full(4, -1.0), make_context(objective)
    actual = ratio(TokenStats(logp, 0 * logp), rows, context)
    np.testing.assert_allclose(actual[jnp.array([0, 1, 3])], np.exp([0.1, 0.1, 0.05]), rtol=1e-5)
    loss, by_logp, _ = values_and_gradients(objective, rows, logp, 0.0)
    np.testing.assert_allclose(-loss, [*np.exp([0.3, 0.1]), 0, np.exp(0.15)], rtol=1e-5)
    np.testing.assert_allclose(by_logp, loss, rtol=1e-6)


@pytest.mark.parametrize("on_policy", [False, True])
def test_importance_weight_corrects_for_the_sampler_where_the_trainer_recomputes(on_policy):
    """min(p_old / p_sampler, 2), where p_old is the step's own if that is on policy."""
    logp = np.log([0.5, 0.5, 0.5])
    old, sampler = np.log([0.4, 0.6, 0.4]), np.log([0.5, 0.5, 0.01])
    fields = dict(old_logprobs=old.astype(np.float32), sampler_logprobs=sampler.astype(np.float32))
    expected = np.minimum(np.exp((logp if on_policy else old) - sampler), 2.0)
    open_clip = dict(clip_low=1.0, clip_high=math.inf)
    r = 1.0 if on_policy else np.exp(logp - old)
    for role, coefficients in [
        (Role.SELF, {}),
        (Role.PREFIX, dict(prefix="one", prefix_policy=1.0, policy_aggregation="tokens")),
    ]:
        rows = make_rows(3, role, **fields)
        for kind, factor in [("trainer", expected), ("sampler", 1.0)]:
            objective = grpo(old_logprobs=kind, **open_clip, **coefficients)
            _, by_logp, _ = values_and_gradients(objective, rows, logp, 0.0, on_policy=on_policy)
            np.testing.assert_allclose(-by_logp, factor * r, rtol=1e-5)
            stats = TokenStats(jnp.asarray(logp), jnp.zeros(3))
            weight = importance_weight(stats, rows, make_context(objective, on_policy))
            np.testing.assert_allclose(weight, np.broadcast_to(factor, 3), rtol=1e-5)


def test_likelihoods_and_demonstrations_take_no_importance_weight():
    sampler = np.log([0.1, 0.9]).astype(np.float32)
    for preset, role in [("srft_paper", Role.SELF), ("luffy", Role.DEMONSTRATION)]:
        rows = make_rows(2, role, sampler_logprobs=sampler)
        losses = [
            values_and_gradients(
                expand(ObjectiveConfig(preset=preset, old_logprobs=kind)),
                rows,
                [-1.0] * 2,
                [0.5] * 2,
            )
            for kind in ("sampler", "trainer")
        ]
        assert np.any(losses[0][1])
        np.testing.assert_array_equal(*losses)


LOGITS, REFERENCE_LOGITS = jnp.array([0.3, -1.0, 2.0, 0.1]), jnp.array([1.0, 0.5, 0.2, -0.4])


def exact_kl(logits):
    logp, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE_LOGITS)
    return jnp.sum(jnp.exp(logp) * (logp - ref))


def expected_estimate(logits, estimator):
    """E_{v ~ policy} of the estimate of token v, the distribution drawn from held fixed."""
    logp, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE_LOGITS)
    drawn = jax.lax.stop_gradient(jnp.exp(logp))
    kl = jnp.broadcast_to(exact_kl(logits), logp.shape)
    stats = ReferencedStats(logp, 0 * logp, ref, kl)
    return jnp.sum(drawn * kl_estimate(stats, grpo(kl=1.0, kl_estimator=estimator)))


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_estimates_of_the_kl_have_its_expectation(estimator):
    np.testing.assert_allclose(expected_estimate(LOGITS, estimator), exact_kl(LOGITS), rtol=1e-5)


def test_gradients_of_the_estimates():
    """k1 as a score function, and k2, have the KL's own in expectation; k3 that of KL(ref || p),
    the plain log-ratio none."""
    exact = jax.grad(exact_kl)(LOGITS)
    assert np.abs(exact).max() > 0.1
    for estimator in ("k1", "k2", "full"):
        actual = jax.grad(expected_estimate)(LOGITS, estimator)
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-6)
    p, ref = jax.nn.softmax(LOGITS), jax.nn.softmax(REFERENCE_LOGITS)
    np.testing.assert_allclose(jax.grad(expected_estimate)(LOGITS, "k3"), p - ref, rtol=1e-4)
    plain = jax.grad(lambda logits: jnp.sum(p * jax.nn.log_softmax(logits)))(LOGITS)
    np.testing.assert_allclose(plain, 0.0, atol=1e-6)


def test_no_weight_multiplies_the_kl():
    logp, ref = np.array([-1.0, -2.0]), np.array([-1.5, -1.0])
    rows = make_rows(2, weight=[0.0, 0.0])
    loss, by_logp, _ = values_and_gradients(grpo(kl=0.5, kl_estimator="k2"), rows, logp, 0.0, ref)
    np.testing.assert_allclose(loss, 0.5 * (logp - ref) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(by_logp, 0.5 * (logp - ref), rtol=1e-6)


def test_a_bounded_exponential_keeps_its_gradient():
    x = jnp.array([-300.0, 0.0, 19.0, 21.0, 300.0])
    expected = np.exp([-300, 0, 19, 20, 20.0])
    np.testing.assert_allclose(bounded_exp(x), expected, rtol=1e-5, atol=1e-30)
    slopes = jax.vmap(jax.grad(bounded_exp))(x)
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-30)


def test_log_ratio_on_policy_is_zero_with_a_gradient():
    rows, context = make_rows(2, old_logprobs=[-5.0, -5.0]), make_context(grpo(), on_policy=True)

    def of(logp):
        return log_ratio(TokenStats(logp, 0 * logp), rows, context)

    logp = jnp.array([-1.0, -2.0])
    assert not np.any(of(logp))
    np.testing.assert_array_equal(jax.jacobian(of)(logp), np.eye(2))
