"""Our loss, packed, masked and in float32, against the oracle's plain lists."""

import dataclasses
import functools

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from oracle import L_MAX
from ragged import answer, groups, to_batch

from srft_jax.batch import Role
from srft_jax.config import ObjectiveConfig
from srft_jax.objectives.loss import LossContext, loss_terms, token_objective
from srft_jax.objectives.methods import PRESETS, expand
from srft_jax.ops.head import TokenStats

ragged = settings(max_examples=15, deadline=None, derandomize=True, database=None)
presets = pytest.mark.parametrize("preset", PRESETS)


@functools.cache
def compiled(objective, on_policy=False):
    """(stats, batch, previous entropies) -> (total, terms), gradient of the total by stats."""

    def microbatch_terms(stats, rows, normalisers, previous):
        stats, rows = jax.tree.map(lambda x: x.reshape(-1), (stats, rows))
        context = LossContext(normalisers, *previous, objective, on_policy)
        return {k: v.sum() for k, v in loss_terms(stats, rows, context).items()}

    def total(stats, batch, previous):
        run = jax.vmap(microbatch_terms, in_axes=(0, 0, None, None))
        parts = run(stats, batch.rows, batch.normalisers, previous)
        terms = {name: values.sum() for name, values in parts.items()}
        return sum(terms.values()), terms

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def evaluate(groups, objective, previous=(0.0, 0.0), on_policy=False):
    batch, stats = to_batch(groups, objective)
    (loss, terms), grads = compiled(objective, on_policy)(stats, batch, previous)
    return loss, terms, grads, batch


@presets
def test_terms_equal_the_oracle(preset):
    objective = expand(ObjectiveConfig(preset=preset))

    @ragged
    @given(groups(objective))
    def check(groups):
        loss, terms, grads, _ = evaluate(groups, objective)
        expected = oracle.loss_terms(groups, preset)
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(terms[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-5, atol=1e-5)
        assert all(np.all(np.isfinite(x)) for x in grads)

    check()


@presets
def test_gradients_equal_finite_differences_of_the_oracle(preset):
    """By all log-probs, entropies and divergences at once, along random directions; what a
    stop-gradient freezes stays."""
    objective = expand(ObjectiveConfig(preset=preset))

    @settings(ragged, max_examples=6)
    @given(groups(objective, max_groups=2))
    def check(groups):
        _, _, grads, batch = evaluate(groups, objective)
        trained, slots = np.asarray(batch.rows.loss_mask), np.asarray(batch.rows.targets)
        assert all(not np.any(g[~trained]) for g in grads)
        random, size = np.random.default_rng(0), slots.max() + 1
        for _ in range(3):
            directions = {n: random.uniform(-1, 1, size) for n in ("logp", "entropy", "kl")}
            along = [directions["logp"], directions["entropy"], np.zeros(size), directions["kl"]]
            actual = sum(np.sum(g * d[slots]) for g, d in zip(grads, along, strict=False))
            slope = oracle_slope(groups, preset, directions)
            np.testing.assert_allclose(actual, slope, rtol=1e-4, atol=2e-5)

    check()


def oracle_slope(groups, preset, directions, step=1e-5):
    """Tokens are numbered from 1, as `to_batch` does."""
    everything = [answer for group in groups for answer in group]

    def moved(sign):
        first = 1
        for moved_answer in everything:
            span = slice(first, first := first + len(moved_answer.logp))
            for name, direction in directions.items():
                values = (
                    np.array(getattr(moved_answer.frozen, name)) + sign * step * direction[span]
                )
                setattr(moved_answer, name, values.tolist())
        return oracle.loss(groups, preset)

    slope = (moved(1) - moved(-1)) / (2 * step)
    moved(0)
    return slope


MIXED = [
    answer(False, 1.0, [-1.0, -0.5], [0.2, 0.9]),
    answer(False, 0.0, [-2.0], [1.5]),
    answer(True, 1.0, [-0.7, -1.2, -0.1], [0.4, 0.1, 2.0]),
]


@presets
def test_on_policy_equals_old_logprobs_that_are_our_own(preset):
    """On policy the given ones are not read; off policy they matter wherever there is a ratio."""
    objective = expand(ObjectiveConfig(preset=preset))
    first = dataclasses.replace(MIXED[0], given=1 if objective.prefix != "none" else 0)
    shifted = [
        answer(False, a.reward, a.logp, a.entropy, [x - 0.1 for x in a.logp], given=a.given)
        for a in (first, MIXED[1])
    ]
    exact = evaluate([[first, *MIXED[1:]]], objective)
    off_policy = evaluate([[*shifted, MIXED[2]]], objective)
    on_policy = evaluate([[*shifted, MIXED[2]]], objective, on_policy=True)
    assert np.any(exact[2].logprob)
    np.testing.assert_allclose(exact[0], on_policy[0], rtol=1e-6)
    for a, b in zip(exact[2], on_policy[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    has_ratio = objective.self_form == "policy_gradient"
    assert np.array_equal(exact[2].logprob, off_policy[2].logprob) == (not has_ratio)


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
    divisor = L_MAX if preset == "srft_official" else 3
    np.testing.assert_allclose(terms["demo_nll"], expected / divisor, rtol=1e-6)

    good = MIXED[0]
    entropies = {"token": good.entropy, "sequence": [sum(good.entropy) / 2] * 2, "batch": [0.3] * 2}
    advantage, bad_advantage = 1 - 2 / 3, -2 / 3
    expected = -sum(0.1 * np.exp(h) * advantage for h in entropies[scope]) - bad_advantage
    divisor = L_MAX if preset == "srft_official" else 6
    np.testing.assert_allclose(terms["self"], expected / divisor, rtol=1e-6)


def test_the_entropy_of_a_sequence_leaves_out_what_was_given():
    objective = expand(
        ObjectiveConfig(preset="uft", entropy_scope="sequence", self_positive_entropy=1)
    )
    started = answer(False, 1.0, [-1.0, -2.0, -3.0], [9.0, 0.2, 0.4], given=1)
    _, terms, _, _ = evaluate([[started, MIXED[1]]], objective)
    a = 0.5**0.5  # of rewards 1 and 0
    np.testing.assert_allclose(terms["self"], -(2 * np.exp(0.3) * a - a) / 3, rtol=1e-4)


@presets
def test_weights_take_no_gradient(preset):
    """The only path from H to the loss is the entropy bonus."""
    objective = expand(ObjectiveConfig(preset=preset))
    _, _, grads, batch = evaluate([MIXED], objective)
    slopes = np.unique(np.asarray(grads.entropy)[batch.rows.loss_mask])
    bonus = -objective.entropy_bonus / 6  # there are 6 tokens, and the cap is 6 as well
    np.testing.assert_allclose(slopes, [bonus], rtol=1e-6, atol=0)


@presets
def test_zero_count_gives_zero(preset):
    loss, terms, grads, _ = evaluate([], expand(ObjectiveConfig(preset=preset)))
    assert loss == 0 and not any(terms.values()) and not np.any(np.stack(grads))


VARIANTS = [dict(preset=preset) for preset in PRESETS] + [
    dict(preset="grpo", dual_clip=3.0),
    dict(preset="grpo", old_logprobs="trainer", importance_cap=float("inf")),
    dict(preset="grpo", surrogate="cispo", clip_high=float("inf")),
    *(dict(preset="grpo", kl=1.0, kl_estimator=k) for k in ("k1", "k2", "k3", "full")),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_extremes_stay_finite(variant):
    """Tokens of probability 0 and 1, to us, to who wrote them and to the reference."""
    objective = expand(ObjectiveConfig(**variant))
    logp, old = [-200.0, -1e-7, -200.0, -1e-7], [-1e-7, -200.0, -200.0, -1e-7]
    far = [
        answer(d, reward, logp, [0.0, 11.9, 11.9, 0.0], old, given=0 if d else 2)
        for d in (False, True)
        for reward in (0.0, 1.0)
    ]
    for extreme in far:
        extreme.ref_logp, extreme.kl = old[::-1], [0.0, 200.0, 200.0, 0.0]
    if objective.prefix == "none":
        far = [dataclasses.replace(extreme, given=0) for extreme in far]
    for on_policy in (False, True):
        loss, _, grads, _ = evaluate([far], objective, on_policy=on_policy)
        assert np.isfinite(loss) and np.all(np.isfinite(np.stack(grads)))


def test_the_objective_of_a_token_is_the_sum_of_its_terms():
    objective = expand(ObjectiveConfig(preset="srft_official"))
    batch, stats = to_batch([MIXED], objective)
    context = LossContext(batch.normalisers, 0.0, 0.0, objective, False)
    terms = loss_terms(stats, batch.rows, context)
    assert terms.keys() == {"demo_nll", "demo_policy", "self", "entropy_bonus"}
    values = token_objective(stats, batch.rows, context)
    np.testing.assert_allclose(values, sum(terms.values()), rtol=1e-6)
    assert np.array_equal(values != 0, batch.rows.loss_mask)


def test_a_kl_without_a_reference_is_an_error():
    objective = expand(ObjectiveConfig(preset="uft"))
    batch, stats = to_batch([MIXED], objective)
    context = LossContext(batch.normalisers, 0.0, 0.0, objective, False)
    with pytest.raises(TypeError, match="needs the statistics of a reference"):
        loss_terms(TokenStats(*stats[:2]), batch.rows, context)


@pytest.mark.parametrize(
    ("preset", "roles"),
    [
        ("srft", {Role.SELF, Role.DEMONSTRATION}),
        ("uft", {Role.SELF, Role.DEMONSTRATION, Role.HINT}),
        ("prefix_rft", {Role.SELF, Role.DEMONSTRATION, Role.PREFIX}),
    ],
)
def test_every_role_is_drawn(preset, roles):
    """Else the tests above could not fail on it."""
    objective, drawn = expand(ObjectiveConfig(preset=preset)), set()

    @ragged
    @given(groups(objective))
    def collect(groups):
        batch, _ = to_batch(groups, objective)
        drawn.update(np.unique(batch.rows.role[batch.rows.loss_mask]))

    collect()
    assert drawn == roles
