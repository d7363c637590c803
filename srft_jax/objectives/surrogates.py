"""The policy gradient's surrogates S and the KL's estimators, elementwise over tokens.

Nothing overflows: no ratio of probabilities is taken to be above e^20.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from srft_jax.config import Objective
from srft_jax.ops.head import ReferencedStats

_MAX_LOG_RATIO = 20.0


def bounded_exp(log_ratio: Array) -> Array:
    """Return exp(x), at most e^20; above, the value grows no more, and the gradient stays e^20."""
    excess = jnp.maximum(log_ratio - _MAX_LOG_RATIO, 0.0)
    return jnp.exp(log_ratio - jax.lax.stop_gradient(excess))


def _clip_bounds(advantage: Array, objective: Objective) -> tuple[Array, Array]:
    """Lowest and highest ratio that goes into S unchanged.

    PPO's -min(r A, clip(r) A) bounds a ratio only where a further step would raise the objective:
    from above for A > 0, from below for A < 0. For A < 0 dual clip, -max(min(r A, clip(r) A), c A),
    bounds it from above as well, at c. CISPO bounds a factor, not a step, so its bounds do not
    depend on the sign of A.
    """
    low, high = jnp.float32(1.0 - objective.clip_low), jnp.float32(1.0 + objective.clip_high)
    if objective.surrogate == "cispo":
        return low, high
    return (
        jnp.where(advantage < 0, low, 0.0),
        jnp.where(advantage < 0, jnp.float32(objective.dual_clip), high),
    )


def is_clipped(ratio: Array, advantage: Array, objective: Objective) -> tuple[Array, Array]:
    """Return where the ratio is too low and where it is too high; nowhere for an advantage of 0."""
    low, high = _clip_bounds(advantage, objective)
    return (advantage != 0) & (ratio < low), (advantage != 0) & (ratio > high)


def clipped(ratio: Array, advantage: Array, objective: Objective) -> Array:
    """Return the ratio within its bounds; on a bound itself it keeps its gradient."""
    low, high = _clip_bounds(advantage, objective)
    too_low, too_high = is_clipped(ratio, advantage, objective)
    return jnp.where(too_low, low, jnp.where(too_high, high, ratio))


def surrogate_loss(
    logprob: Array, ratio: Array, advantage: Array, objective: Objective
) -> Float[Array, " N"]:
    """Return S: -clip(r) A, or CISPO's -sg(clip(r)) A logp, whose gradient no clip stops."""
    factor = clipped(ratio, advantage, objective) * advantage
    if objective.surrogate == "cispo":
        return -jax.lax.stop_gradient(factor) * logprob
    return -factor


def kl_estimate(stats: ReferencedStats, objective: Objective) -> Float[Array, " N"]:
    """Return an estimate of KL(policy || reference) at each token, by objective.kl_estimator.

    With d = log p - log p_ref of the sampled token:

        k1    d, in the score-function form sg(d) p / sg(p): the gradient of d itself is that of
              log p alone, whose expectation is 0, while d grad log p is an unbiased estimate of the
              KL's gradient.
        k2    d^2 / 2, which has the same gradient d grad log p.
        k3    exp(-d) + d - 1, never negative and of low variance.
        full  the sum over the vocabulary, the only one that is right where the policy did not
              sample the token.
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
