"""The general form of the loss, a function of each token's log-prob and entropy and of data that
are known before the forward pass.

    L = sum over DEMONSTRATION tokens   a (-logp) / Z_demo - demo_policy rho A / Z_policy
      + sum over HINT tokens            hint_nll (-logp) / Z_demo
      + sum over PREFIX tokens          prefix_policy i S / Z_policy
      + sum over SELF tokens            w i S / Z_policy
      + sum over kl_role's tokens       kl KL / Z_kl
      - sum over SELF, DEMONSTRATION    entropy_bonus H / Z_entropy

with a = demo_nll exp(+-H) {1, p, p(1-p)}, w = self_positive exp(+-H) for good completions and
self_negative for all other ones, rho = r / (r + gamma) with r = p / p_behavior, S the surrogate of
objectives/surrogates.py, and i = min(p_old / p_sampler, importance_cap), or 1 where the old
log-probs are the sampler's. For completions i S may be -logp (up) and +logp (down) instead.
`rows.weight` multiplies likelihoods and policy gradients, not the KL nor the bonus. Weights take no
gradient. Where the aggregation is `sequences`, Z counts sequences, and each token's term is divided
by the number of trained tokens of its sequence: a mean of means.

A token's loss needs that token alone, but for two settings that need its whole sequence:
entropy_scope = sequence, and surrogate = gspo.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from srft_jax.batch import Normalisers, Role, Rows, role_mask
from srft_jax.config import Objective
from srft_jax.objectives.surrogates import bounded_exp, kl_estimate, surrogate_loss
from srft_jax.ops.head import ReferencedStats, TokenStats

Stats = TokenStats | ReferencedStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossContext:
    """What the loss needs beside the tokens."""

    normalisers: Normalisers
    # Mean entropy of the previous step's tokens of each role, for entropy_scope = batch.
    entropy_self: Float[Array, ""]
    entropy_demonstration: Float[Array, ""]
    objective: Objective = dataclasses.field(metadata=dict(static=True))
    # `Batch.on_policy`: old log-probs are the step's own.
    on_policy: bool = dataclasses.field(metadata=dict(static=True))


def _per_count(values: Array, count: Array) -> Array:
    """values / count, and 0 where there is nothing to count."""
    return jnp.where(count > 0, values / jnp.maximum(count, 1e-9), 0.0)


def _sequence_mean(values: Array, counted: Array, rows: Rows) -> Array:
    """Each token gets the mean over its sequence's counted tokens; 0 where there are none."""
    size = values.shape[0]  # no microbatch has more sequences than tokens
    totals = jax.ops.segment_sum(jnp.where(counted, values, 0.0), rows.sequence_ids, size)
    counts = jax.ops.segment_sum(counted.astype(jnp.float32), rows.sequence_ids, size)
    return _per_count(totals, counts)[rows.sequence_ids]


def _scoped_entropy(stats: Stats, rows: Rows, context: LossContext) -> Array:
    """H in the objective's scope: the token's, its sequence's mean, or the previous step's mean."""
    entropy = jax.lax.stop_gradient(stats.entropy)
    scope = context.objective.entropy_scope
    if scope == "token":
        return entropy
    if scope == "batch":
        return jnp.where(
            rows.role == Role.SELF, context.entropy_self, context.entropy_demonstration
        )
    return _sequence_mean(entropy, role_mask(rows, Role.SELF, Role.DEMONSTRATION), rows)


def sft_weight(stats: Stats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """Return a = demo_nll exp(s H) {1, p, p(1-p)} of demonstrations, times `rows.weight`."""
    objective = context.objective
    entropy = _scoped_entropy(stats, rows, context)
    p = jnp.exp(jax.lax.stop_gradient(stats.logprob))
    factor = {"none": jnp.ones_like(p), "p": p, "p(1-p)": p * (1.0 - p)}
    weight = objective.demo_nll * jnp.exp(objective.demo_nll_entropy * entropy)
    return weight * factor[objective.demo_nll_probability] * rows.weight


def rl_weight(stats: Stats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """Return w = self_positive exp(s H) of good completions, times `rows.weight`."""
    objective = context.objective
    entropy = _scoped_entropy(stats, rows, context)
    weight = objective.self_positive * jnp.exp(objective.self_positive_entropy * entropy)
    return weight * rows.weight


def is_positive(rows: Rows, objective: Objective) -> Bool[Array, " N"]:
    """Return which completions are good: correct for a likelihood, A > 0 for a policy gradient."""
    return rows.correct if objective.self_form == "likelihood" else rows.advantage > 0


def _old_logprobs(stats: Stats, rows: Rows, context: LossContext) -> Array:
    return jax.lax.stop_gradient(stats.logprob) if context.on_policy else rows.old_logprobs


def log_ratio(stats: Stats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """Return log p - log p_old; on policy its value is 0 and its gradient is that of log p."""
    return stats.logprob - _old_logprobs(stats, rows, context)


def ratio(stats: Stats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """Return r = p / p_old of SELF and PREFIX tokens, which the surrogate clips.

    GSPO: s = exp(mean of log r over the sequence's SELF tokens), as s_t = sg(s) p_t / sg(p_t), so
    that every token has a gradient of its own.
    """
    log_r = log_ratio(stats, rows, context)
    if context.objective.surrogate != "gspo":
        return bounded_exp(log_r)
    fixed = jax.lax.stop_gradient(log_r)
    mean = _sequence_mean(fixed, role_mask(rows, Role.SELF), rows)
    return bounded_exp(mean + (log_r - fixed))


def importance_weight(stats: Stats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """Return min(p_old / p_sampler, importance_cap), which corrects for the sampler's arithmetic.

    1 where old log-probs are the sampler's: off policy the ratio itself then holds the difference,
    on policy it is left uncorrected.
    """
    if context.objective.old_logprobs == "sampler":
        return jnp.ones_like(stats.logprob)
    difference = _old_logprobs(stats, rows, context) - rows.sampler_logprobs
    cap = math.log(context.objective.importance_cap)
    return jax.lax.stop_gradient(bounded_exp(jnp.minimum(difference, cap)))


def _policy_gradient(stats: Stats, rows: Rows, context: LossContext) -> Array:
    """S, times the importance weight."""
    loss = surrogate_loss(
        stats.logprob, ratio(stats, rows, context), rows.advantage, context.objective
    )
    return importance_weight(stats, rows, context) * loss


def _self_loss(stats: Stats, rows: Rows, context: LossContext) -> Array:
    """w S of completions, before the normaliser."""
    objective = context.objective
    positive = is_positive(rows, objective)
    negative_weight = objective.self_negative * rows.weight
    weight = jnp.where(positive, rl_weight(stats, rows, context), negative_weight)
    if objective.self_form == "likelihood":
        return jnp.where(positive, -weight, weight) * stats.logprob
    return weight * _policy_gradient(stats, rows, context)


def _demonstration_ratio(stats: Stats, rows: Rows, gamma: float) -> Array:
    """rho = r / (r + gamma) with r = p / p_behavior, or r for gamma = 0."""
    log_r = stats.logprob - rows.old_logprobs
    return jax.nn.sigmoid(log_r - math.log(gamma)) if gamma else bounded_exp(log_r)


def _kl(stats: Stats, objective: Objective) -> Array:
    if not isinstance(stats, ReferencedStats):
        raise TypeError("an objective with a KL needs the statistics of a reference")
    return kl_estimate(stats, objective)


def loss_terms(stats: Stats, rows: Rows, context: LossContext) -> dict[str, Float[Array, " N"]]:
    """Return the loss of each token by term, weighted and normalised.

    A term whose weight is 0 is absent. The formula stands at the top of this file.
    """
    objective, z = context.objective, context.normalisers
    # A mean over sequences of their means: each token counts 1 / trained tokens of its sequence.
    by_sequence = {"sequences": rows.inverse_length}
    nll_share = by_sequence.get(objective.demo_aggregation, 1.0)
    policy_share = by_sequence.get(objective.policy_aggregation, 1.0)
    completion, demo = role_mask(rows, Role.SELF), role_mask(rows, Role.DEMONSTRATION)

    def nll(where: Array, loss: Array) -> Array:
        return _per_count(jnp.where(where, loss * nll_share, 0.0), z.demonstration)

    def normalised(where: Array, loss: Array, count: Array = z.policy) -> Array:
        return _per_count(jnp.where(where, loss * policy_share, 0.0), count)

    terms = {}
    if objective.demo_nll:
        terms["demo_nll"] = nll(demo, -sft_weight(stats, rows, context) * stats.logprob)
    if objective.hint_nll:
        hint = role_mask(rows, Role.HINT)
        terms["hint_nll"] = nll(hint, -objective.hint_nll * rows.weight * stats.logprob)
    if objective.demo_policy:
        rho = _demonstration_ratio(stats, rows, objective.demo_ratio_gamma)
        weight = objective.demo_policy * rows.weight
        terms["demo_policy"] = normalised(demo, -weight * rho * rows.advantage)
    if objective.prefix_policy:
        weight = objective.prefix_policy * rows.weight
        prefix = role_mask(rows, Role.PREFIX)
        terms["prefix_policy"] = normalised(prefix, weight * _policy_gradient(stats, rows, context))
    if objective.self_form != "none":
        terms["self"] = normalised(completion, _self_loss(stats, rows, context))
    if objective.kl:
        where = completion if objective.kl_role == "self" else demo
        terms["kl"] = normalised(where, objective.kl * _kl(stats, objective), z.kl)
    if objective.entropy_bonus:
        bonus = -objective.entropy_bonus * stats.entropy
        terms["entropy_bonus"] = normalised(completion | demo, bonus, z.entropy)
    return terms


def token_objective(stats: Stats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """Return the loss of each token, over all terms; ops/head.py sums it."""
    return sum(loss_terms(stats, rows, context).values(), start=jnp.zeros_like(stats.logprob))
