"""Our loss, packed, masked and in float32, against the oracle's plain lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from ragged import LENGTH_CAP, groups, to_batch

from srft_jax.config import ObjectiveConfig
from srft_jax.objectives.loss import LossContext, loss_terms, token_objective
from srft_jax.objectives.methods import PRESETS, expand

ragged = settings(max_examples=40, deadline=None, derandomize=True, database=None)
presets = pytest.mark.parametrize("preset", PRESETS)


@functools.cache
def compiled(objective, on_policy=False):
    """(stats, batch, previous entropies) -> (total, terms), gradient of the total by stats."""

    def of_microbatch(stats, rows, normalisers, previous):
        stats, rows = jax.tree.map(lambda x: x.reshape(-1), (stats, rows))
        context = LossContext(normalisers, *previous, objective, on_policy)
        terms = {k: v.sum() for k, v in loss_terms(stats, rows, context).items()}
        return token_objective(stats, rows, context).sum(), terms

    def total(stats, batch, previous):
        run = jax.vmap(of_microbatch, in_axes=(0, 0, None, None))
        totals, terms = run(stats, batch.rows, batch.normalisers, previous)
        return totals.sum(), {k: v.sum() for k, v in terms.items()}

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def evaluate(groups, objective, previous=(0.0, 0.0), on_policy=False):
    batch, stats = to_batch(groups, objective)
    (loss, terms), grads = compiled(objective, on_policy)(stats, batch, previous)
    return loss, terms, grads, batch


@presets
def test_terms_equal_the_oracle(preset):
    objective = expand(ObjectiveConfig(preset=preset))

    @ragged
    @given(groups())
    def check(groups):
        loss, terms, grads, _ = evaluate(groups, objective)
        expected = oracle.loss_terms(groups, preset, LENGTH_CAP)
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-5, atol=1e-5)
        assert all(np.all(np.isfinite(x)) for x in grads)

    check()


@presets
def test_gradients_equal_finite_differences_of_the_oracle(preset):
    """By every log-prob and entropy, the weights' entropies and the old log-probs frozen."""
    objective = expand(ObjectiveConfig(preset=preset))

    @settings(ragged, max_examples=8)
    @given(groups(max_groups=2))
    def check(groups):
        _, _, grads, batch = evaluate(groups, objective)
        trained = np.asarray(batch.rows.loss_mask)
        by_token = [dict(zip(batch.rows.targets[trained], g[trained], strict=True)) for g in grads]
        assert all(not np.any(g[~trained]) for g in grads)
        token = 0
        for answer in (answer for group in groups for answer in group):
            for t in range(len(answer.logp)):
                token += 1
                for values, gradient in zip((answer.logp, answer.entropy), by_token, strict=True):
                    slope = oracle_slope(groups, preset, values, t)
                    np.testing.assert_allclose(gradient[token], slope, rtol=1e-4, atol=1e-5)
        assert token == trained.sum()

    check()


def oracle_slope(groups, preset, values, t, step=1e-5):
    here, sides = values[t], []
    for sign in (1, -1):
        values[t] = here + sign * step
        sides.append(oracle.loss(groups, preset, LENGTH_CAP))
    values[t] = here
    return (sides[0] - sides[1]) / (2 * step)


def answer(demonstration, reward, logp, entropy, old=None):
    return oracle.Answer(demonstration, reward, logp, entropy, list(entropy), old or list(logp))


MIXED = [
    answer(False, 1.0, [-1.0, -0.5], [0.2, 0.9]),
    answer(False, 0.0, [-2.0], [1.5]),
    answer(True, 1.0, [-0.7, -1.2, -0.1], [0.4, 0.1, 2.0]),
]


@presets
def test_on_policy_equals_old_logprobs_that_are_our_own(preset):
    """On policy the given ones are not read; off policy they matter wherever there is a ratio."""
    objective = expand(ObjectiveConfig(preset=preset))
    shifted = [
        answer(a.demonstration, a.reward, a.logp, a.entropy, [x - 0.1 for x in a.logp])
        for a in MIXED
    ]
    given, off_policy = evaluate([MIXED], objective), evaluate([shifted], objective)
    own = evaluate([shifted], objective, on_policy=True)
    assert np.any(given[2].logprob)
    np.testing.assert_allclose(given[0], own[0], rtol=1e-6)
    for a, b in zip(given[2], own[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    has_ratio = objective.self_form == "policy_gradient"
    assert np.array_equal(given[2].logprob, off_policy[2].logprob) == (not has_ratio)


@pytest.mark.parametrize("preset", ["srft", "srft_official"])
@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
def test_scope_of_the_entropy(preset, scope):
    """Weights read H of the token, the mean of its sequence, or that of the previous step."""
    objective = expand(ObjectiveConfig(preset=preset, entropy_scope=scope))
    sign = objective.demo_nll_entropy
    demo = MIXED[2]
    _, terms, _, _ = evaluate([MIXED], objective, previous=(0.3, 0.8))
    entropies = {"token": demo.entropy, "sequence": [sum(demo.entropy) / 3] * 3, "batch": [0.8] * 3}
    expected = sum(
        0.5 * np.exp(sign * h) * -p for h, p in zip(entropies[scope], demo.logp, strict=True)
    )
    divisor = LENGTH_CAP if preset == "srft_official" else 3
    np.testing.assert_allclose(terms["demo_nll"], expected / divisor, rtol=1e-6)

    good = MIXED[0]
    entropies = {"token": good.entropy, "sequence": [sum(good.entropy) / 2] * 2, "batch": [0.3] * 2}
    advantage, bad_advantage = 1 - 2 / 3, -2 / 3
    expected = -sum(0.1 * np.exp(h) * advantage for h in entropies[scope]) - bad_advantage
    divisor = LENGTH_CAP if preset == "srft_official" else 6
    np.testing.assert_allclose(terms["self"], expected / divisor, rtol=1e-6)


def test_weights_take_no_gradient():
    """The only path from H to the loss is the entropy bonus."""
    for preset in PRESETS:
        objective = expand(ObjectiveConfig(preset=preset))
        _, _, grads, batch = evaluate([MIXED], objective)
        slopes = np.unique(np.asarray(grads.entropy)[batch.rows.loss_mask])
        bonus = -objective.entropy_bonus / LENGTH_CAP  # both presets with a bonus divide by the cap
        np.testing.assert_allclose(slopes, [bonus], rtol=1e-6, atol=0)


def test_zero_count_gives_zero():
    for preset in PRESETS:
        loss, terms, grads, _ = evaluate([], expand(ObjectiveConfig(preset=preset)))
        assert loss == 0 and not any(terms.values()) and not np.any(np.stack(grads))


def test_extreme_logprobs_stay_finite():
    far = [answer(d, r, [-200.0, -1e-7], [0.0, 11.9]) for d in (False, True) for r in (0.0, 1.0)]
    for preset in PRESETS:
        loss, _, grads, _ = evaluate([far], expand(ObjectiveConfig(preset=preset)))
        assert jnp.isfinite(loss) and np.all(np.isfinite(np.stack(grads))), preset
