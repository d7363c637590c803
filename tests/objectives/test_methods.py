"""The table of methods: expansion, overriding, errors, and what each row does to one token."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.batch import Normalisers, Role, Rows
from srft_jax.config import ObjectiveConfig, UsageError
from srft_jax.objectives.loss import LossContext, clipped, token_objective
from srft_jax.objectives.methods import PRESETS, Objective, expand
from srft_jax.ops.head import TokenStats

ENTROPY, LENGTH_CAP = 0.7, 8


def test_every_preset_is_a_choice_of_the_configuration_and_expands_to_its_row():
    choices = typing.get_args(typing.get_type_hints(ObjectiveConfig)["preset"])
    assert set(choices) == set(PRESETS)
    for name, row in PRESETS.items():
        assert expand(ObjectiveConfig(preset=name)) == row


def test_every_coefficient_can_be_overridden():
    names = [field.name for field in dataclasses.fields(Objective)]
    assert names == [field.name for field in dataclasses.fields(ObjectiveConfig)][2:]
    other = dict(
        demo_nll=0.3, demo_nll_entropy=0, demo_policy=0.9, demo_ratio_gamma=0.2, self_form="none",
        self_positive=0.4, self_positive_entropy=-1, self_negative=0.6, entropy_scope="batch",
        advantage_group="self", advantage_std=True, clip_low=0.0, clip_high=0.5, entropy_bonus=0.01,
        demo_aggregation="sequences", policy_aggregation="length_cap",
    )  # fmt: skip
    assert other.keys() == set(names)
    for name, value in other.items():
        expected = dataclasses.replace(PRESETS["srft"], **{name: value})
        assert expected != PRESETS["srft"]
        assert expand(ObjectiveConfig(**{name: value})) == expected


def test_zero_overrides_a_preset():
    assert expand(ObjectiveConfig(preset="srft", demo_policy=0.0)).demo_policy == 0.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(clip_low=-0.1), r"clip_low = -0.1 .* do not bracket a ratio of 1"),
        (dict(clip_low=1.1), r"clip_low = 1.1 .* do not bracket a ratio of 1"),
        (dict(clip_high=-0.1), r"clip_high = -0.1 do not bracket a ratio of 1"),
        (dict(demo_ratio_gamma=-1.0), r"demo_ratio_gamma = -1.0 is below 0"),
        (dict(preset="sft", demo_nll=0.0), r"the objective trains nothing"),
        (dict(preset="grpo", self_form="none"), r"the objective trains nothing"),
    ],
)
def test_what_makes_no_sense_is_an_error(config, message):
    with pytest.raises(UsageError, match=message):
        expand(ObjectiveConfig(**config))


def test_what_a_preset_needs():
    needs = {n: (row.uses_demonstrations, row.uses_rollouts) for n, row in PRESETS.items()}
    assert needs.pop("sft") == (True, False)
    assert needs.pop("grpo") == (False, True)
    assert set(needs.values()) == {(True, True)}
    assert Objective(demo_policy=1.0).uses_rollouts  # its advantage is taken over completions


def one_token_loss(preset, role, advantage, correct, old):
    """(logp, H) -> loss of a step that consists of one token, every normaliser a count of 1."""
    objective = expand(ObjectiveConfig(preset=preset))
    one = jnp.ones(1, jnp.int32)
    rows = Rows(
        tokens=one,
        targets=one,
        positions=one,
        segment_ids=one,
        sequence_ids=0 * one,
        role=one * role,
        loss_mask=one > 0,
        advantage=one * jnp.float32(advantage),
        correct=one > (0 if correct else 1),
        old_logprobs=one * jnp.float32(old),
        inverse_length=one * jnp.float32(1.0),
    )
    context = LossContext(Normalisers(1.0, 1.0, 1.0, 1.0, 1.0), 0.0, 0.0, objective, False)

    def loss(logp, entropy):
        stats = TokenStats(jnp.reshape(logp, 1), jnp.reshape(entropy, 1))
        return token_objective(stats, rows, context)[0]

    return loss


def shaped(p):
    """d/dlogp of p / (p + .1)."""
    return 0.1 * p / (p + 0.1) ** 2


UP, DOWN = math.exp(ENTROPY), math.exp(-ENTROPY)
# g = -dL/dlogp of a token, as a function of (p, r, A).
DEMONSTRATION = {
    "srft": lambda p, r, a: shaped(p) * a + 0.5 * DOWN,
    "srft_paper": lambda p, r, a: p * a + 0.5 * DOWN,
    "srft_official": lambda p, r, a: shaped(p) * a + 0.5 * UP,
    "srft_hpt": lambda p, r, a: shaped(p) * a + 0.5 * DOWN,
    "sft": lambda p, r, a: 1.0,
    "grpo": lambda p, r, a: 0.0,
}
ROLLOUT = {  # of a rollout that is correct exactly if A > 0
    "srft": lambda p, r, a: (0.1 * UP if a > 0 else 1.0) * within(r, a) * r * a,
    "srft_paper": lambda p, r, a: 0.1 * UP if a > 0 else -1.0,
    "srft_official": lambda p, r, a: (0.1 * UP if a > 0 else 1.0) * r * a,
    "srft_hpt": lambda p, r, a: 0.1 * UP if a > 0 else -1.0,
    "sft": lambda p, r, a: 0.0,
    "grpo": lambda p, r, a: within(r, a) * r * a,
}


def within(r, a):
    """0 where PPO's clip stops the gradient."""
    return not (r > 1.2 if a > 0 else r < 0.8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("advantage", [0.875, -0.375])
@pytest.mark.parametrize(
    ("role", "table"), [(Role.DEMONSTRATION, DEMONSTRATION), (Role.SELF, ROLLOUT)]
)
def test_gradient_weight_of_one_token(preset, role, table, advantage):
    """Closed form = finite differences = autodiff; logp_old and the weights' H stay at theta_0."""
    for p in (0.02, 0.1, 0.9):
        for r in (0.7, 1.0, 1.3):
            logp, old = math.log(p), math.log(p) - math.log(r)
            loss = one_token_loss(preset, role, advantage, advantage > 0, old)
            expected, step = table[preset](p, r, advantage), 1e-2
            slope = -(loss(logp + step, ENTROPY) - loss(logp - step, ENTROPY)) / (2 * step)
            np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)
            g, bonus = jax.grad(loss, argnums=(0, 1))(logp, ENTROPY)
            np.testing.assert_allclose(-g, expected, rtol=1e-5, atol=1e-6)
            has_bonus = preset in ("srft_official", "srft_hpt")
            np.testing.assert_allclose(bonus, -0.001 if has_bonus else 0.0, rtol=1e-6)


def test_shaping_peaks_at_gamma():
    """The demonstrations' policy gradient is strongest, a quarter of A, at p = gamma = .1."""
    weights = {p: shaped(p) for p in (0.01, 0.05, 0.1, 0.2, 0.9)}
    assert max(weights, key=weights.get) == 0.1
    loss = one_token_loss("srft", Role.DEMONSTRATION, 1.0, True, 0.0)
    g = -jax.grad(loss)(math.log(0.1), ENTROPY)
    np.testing.assert_allclose(g - 0.5 * DOWN, 0.25, rtol=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("bounds", [dict(clip_low=0.0), dict(clip_high=0.0), {}])
def test_a_ratio_of_one_keeps_its_whole_gradient(bounds, advantage):
    """Also where the clip begins at 1: on policy every ratio is 1."""
    objective = expand(ObjectiveConfig(preset="grpo", **bounds))
    slope = jax.grad(lambda log_r: clipped(jnp.exp(log_r), jnp.float32(advantage), objective))(0.0)
    assert slope == advantage


def test_another_preset_on_top_of_stored_coefficients_is_refused():
    stored = ObjectiveConfig(preset="grpo", expanded_from="srft")
    with pytest.raises(UsageError, match="holds all coefficients of srft"):
        expand(stored)
    assert expand(ObjectiveConfig(preset="srft", expanded_from="srft")) == PRESETS["srft"]
