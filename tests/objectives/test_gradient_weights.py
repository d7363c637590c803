"""g = -dL/dlogp of one token in closed form, for every preset and role.

The oracle's finite differences say the same of whole batches; here the formulas stand in one table.
"""

import itertools
import math

import numpy as np
import pytest
from single_tokens import make_rows, values_and_gradients

from srft_jax.batch import Role
from srft_jax.config import ObjectiveConfig
from srft_jax.objectives.advantages import group_advantages
from srft_jax.objectives.methods import PRESETS, expand

ENTROPY, WEIGHT, REFERENCE = 0.7, 0.3, -1.0
UP, DOWN = math.exp(ENTROPY), math.exp(-ENTROPY)


def shaped(p):
    """d/dlogp of p / (p + .1)."""
    return 0.1 * p / (p + 0.1) ** 2


def ppo(low=0.2, high=0.2):
    """r A where the clip does not stop the gradient."""
    return lambda p, r, a: 0.0 if (r > 1 + high if a > 0 else r < 1 - low) else r * a


def unclipped(p, r, a):
    return r * a


def nothing(p, r, a):
    return 0.0


# Functions of (p, r, A), before WEIGHT; presets that are not named have no such term.
DEMONSTRATION = {
    "srft": lambda p, r, a: shaped(p) * a + 0.5 * DOWN,
    "srft_paper": lambda p, r, a: p * a + 0.5 * DOWN,
    "srft_official": lambda p, r, a: shaped(p) * a + 0.5 * UP,
    "srft_hpt": lambda p, r, a: shaped(p) * a + 0.5 * DOWN,
    "luffy": lambda p, r, a: shaped(p) * a,
    "dft": lambda p, r, a: p,
    "chord_phi": lambda p, r, a: p * (1 - p),
} | dict.fromkeys(
    ["sft", "sft_kl", "sft_plus_rl", "chord", "hpt", "relift"], lambda p, r, a: 1.0
)  # fmt: skip
LIKELIHOOD = {  # of a rollout that is correct exactly if A > 0
    "srft_paper": lambda p, r, a: 0.1 * UP if a > 0 else -1.0,
    "srft_hpt": lambda p, r, a: 0.1 * UP if a > 0 else -1.0,
    "on_policy_sft": lambda p, r, a: 1.0 if a > 0 else -1.0,
}
POLICY_GRADIENT = {
    "srft": lambda p, r, a: (0.1 * UP if a > 0 else 1.0) * ppo()(p, r, a),
    "srft_official": lambda p, r, a: (0.1 * UP if a > 0 else 1.0) * r * a,
    "luffy": unclipped,
    "dapo": ppo(high=0.28),
    "gspo": ppo(3e-4, 4e-4),
    "cispo": lambda p, r, a: min(r, 6.0) * a,
} | dict.fromkeys(
    ["grpo", "dr_grpo", "sft_rl", "sft_plus_rl", "chord", "chord_phi", "hpt", "relift", "uft",
     "prefix_rft"], ppo(),
)  # fmt: skip
TABLES = {
    Role.DEMONSTRATION: DEMONSTRATION,
    Role.SELF: LIKELIHOOD | POLICY_GRADIENT,
    Role.HINT: {"uft": lambda p, r, a: 0.001},
    Role.PREFIX: {"prefix_rft": ppo()},
}
BONUS = "srft_official srft_hpt sft_plus_rl luffy hpt relift uft prefix_rft".split()
CASES = list(
    itertools.product((0.02, 0.1, 0.9), (0.7, 0.9998, 1.0, 1.25, 1.3, 7.0), (0.875, -0.375))
)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("role", TABLES)
def test_gradient_weight_of_one_token(preset, role):
    objective = expand(ObjectiveConfig(preset=preset))
    p, r, a = np.array(CASES, np.float32).T
    rows = make_rows(
        len(CASES),
        role,
        advantage=a,
        correct=a > 0,
        weight=np.full(len(CASES), WEIGHT, np.float32),
        old_logprobs=0 * p if role == Role.DEMONSTRATION else np.log(p) - np.log(r),
    )
    _, by_logp, by_entropy = values_and_gradients(objective, rows, np.log(p), ENTROPY, REFERENCE)
    expected = WEIGHT * np.array([TABLES[role].get(preset, nothing)(*case) for case in CASES])
    if preset == "uft" and role == Role.SELF:  # k3, which no weight multiplies
        expected -= 0.001 * (1 - math.exp(REFERENCE) / p)
    np.testing.assert_allclose(-by_logp, expected, rtol=2e-5, atol=1e-6)
    has_bonus = preset in BONUS and role in (Role.SELF, Role.DEMONSTRATION)
    np.testing.assert_allclose(by_entropy, -0.001 if has_bonus else 0.0, rtol=1e-6)


def test_every_preset_has_a_formula():
    named = set().union(*TABLES.values())
    assert named == set(PRESETS)


def demonstration_gradient(preset, p, advantage, old=0.0):
    size = len(p)
    rows = make_rows(
        size,
        Role.DEMONSTRATION,
        advantage=np.full(size, advantage, np.float32),
        old_logprobs=np.full(size, old, np.float32),
    )
    objective = expand(ObjectiveConfig(preset=preset))
    return -values_and_gradients(objective, rows, np.log(p), 0.0)[1]


def test_shaping_peaks_at_gamma():
    """The demonstrations' policy gradient is strongest, a quarter of A, at p = gamma = .1."""
    p = np.array([0.01, 0.05, 0.1, 0.2, 0.9])
    g = demonstration_gradient("luffy", p, 0.8)
    assert p[np.argmax(g)] == 0.1
    np.testing.assert_allclose(g[2], 0.25 * 0.8, rtol=1e-5)


def test_given_behavior_logprobs_divide_the_probability():
    """Then the peak is at p / p_behavior = .1."""
    p = np.array([0.01, 0.05, 0.1, 0.2, 0.9])
    np.testing.assert_allclose(
        demonstration_gradient("luffy", p, 1.0, old=math.log(0.5)), shaped(p / 0.5), rtol=1e-5
    )
    plain = demonstration_gradient("srft_paper", p, 1.0, old=math.log(0.5)) - 0.5
    np.testing.assert_allclose(plain, p / 0.5, rtol=1e-5)


@pytest.mark.parametrize("solved", range(8))
def test_one_right_demonstration_and_seven_rollouts(solved):
    """With `solved` right rollouts A = (7 - solved) / 8, so nothing once all of them are right."""
    rewards = [1.0] * solved + [0.0] * (7 - solved)
    _, (advantage,) = group_advantages(rewards, [1.0], augmented=True, divide_by_std=False)
    g = demonstration_gradient("luffy", np.array([0.1, 0.6]), advantage)
    np.testing.assert_allclose(g, shaped(np.array([0.1, 0.6])) * (7 - solved) / 8, rtol=1e-5)
