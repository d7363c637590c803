"""The policy gradient's surrogates S and the KL's estimators, of a token and elementwise.

Nothing overflows: no ratio of probabilities is taken to be above e^20.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from srft_jax.config import Objective
from srft_jax.ops.head import ReferencedStats

_MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio: Array) -> Array:
    """exp(x), and e^20 above, where the value no longer grows but the gradient stays."""
    excess = jnp.maximum(log_ratio - _MAX_LOG_RATIO, 0.0)
    return jnp.exp(log_ratio - jax.lax.stop_gradient(excess))


def _clip_bounds(advantage: Array, objective: Objective) -> tuple[Array, Array]:
    """Lowest and highest ratio that goes into S unchanged.

    PPO's -min(r A, clip(r) A) bounds a ratio only where a further step would raise the objective:
    from above for A > 0, from below for A < 0. There dual clip, -max(min(r A, clip(r) A), c A),
    bounds it from above as well, at c. CISPO bounds a factor and not a step, so the sign is nothing
    to it.
    """
    low, high = jnp.float32(1.0 - objective.clip_low), jnp.float32(1.0 + objective.clip_high)
    if objective.surrogate == "cispo":
        return low, high
    return (
        jnp.where(advantage < 0, low, 0.0),
        jnp.where(advantage < 0, jnp.float32(objective.dual_clip), high),
    )


def is_clipped(ratio: Array, advantage: Array, objective: Objective) -> tuple[Array, Array]:
    """(where the ratio is too low, where it is too high); nowhere for an advantage of 0."""
    low, high = _clip_bounds(advantage, objective)
    return (advantage != 0) & (ratio < low), (advantage != 0) & (ratio > high)


def clipped(ratio: Array, advantage: Array, objective: Objective) -> Array:
    """The ratio within its bounds; on the bound itself it keeps its gradient."""
    low, high = _clip_bounds(advantage, objective)
    too_low, too_high = is_clipped(ratio, advantage, objective)
    return jnp.where(too_low, low, jnp.where(too_high, high, ratio))


def surrogate_loss(
    logprob: Array, ratio: Array, advantage: Array, objective: Objective
) -> Float[Array, " N"]:
    """S: -clip(r) A, or CISPO's -sg(clip(r)) A logp, whose gradient no clip stops."""
    factor = clipped(ratio, advantage, objective) * advantage
    if objective.surrogate == "cispo":
        return -jax.lax.stop_gradient(factor) * logprob
    return -factor


def kl_estimate(stats: ReferencedStats, objective: Objective) -> Float[Array, " N"]:
    """KL(policy || reference) of a token; with d = logp - log p_ref of the sampled one:

    k1 = d, in the score-function form sg(d) p / sg(p): the gradient of d itself is that of logp
        alone, whose expectation is 0, while d * grad logp is an unbiased estimate of the KL's.
    k2 = d^2 / 2, of that same gradient.
    k3 = exp(-d) + d - 1, never negative and of low variance.
    full = sum over the vocabulary; it alone is right where the token was not sampled by the policy.
    """
    if objective.kl_estimator == "full":
        return stats.kl
    difference = stats.logprob - stats.reference_logprob
    if objective.kl_estimator == "k1":
        score = jnp.exp(stats.logprob - jax.lax.stop_gradient(stats.logprob))
        return jax.lax.stop_gradient(difference) * score
    if objective.kl_estimator == "k2":
        return jnp.square(difference) / 2
    return bounded_exp(-difference) + difference - 1.0
