"""The general form of the loss: elementwise in a token's log-prob and entropy, and in data.

    L = sum over demonstration tokens   a (-logp) / Z_demo  +  demo_policy (-rho A) / Z_policy
      + sum over completion tokens      w S / Z_policy
      - sum over all trained tokens     entropy_bonus H / Z_entropy

with a = demo_nll exp(+-H), w = self_positive exp(+-H) for good completions and self_negative for
the others, and S = -min(r A, clip(r) A), or -logp (up) and +logp (down). Weights take no gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from srft_jax.batch import Normalisers, Role, Rows
from srft_jax.objectives.methods import Objective
from srft_jax.ops.head import TokenStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossContext:
    """What the loss needs beside the tokens."""

    normalisers: Normalisers
    entropy_self: Float[Array, ""]  # the previous step's token means, for entropy_scope = batch
    entropy_demonstration: Float[Array, ""]
    objective: Objective = dataclasses.field(metadata=dict(static=True))
    # Old log-probs are the step's own: one update per rollout, so the ratio is 1 and only its
    # gradient counts.
    on_policy: bool = dataclasses.field(metadata=dict(static=True))


def _per_count(values: Array, count: Array) -> Array:
    """values / count, and 0 where there is nothing to count."""
    return jnp.where(count > 0, values / jnp.maximum(count, 1e-9), 0.0)


def scoped_entropy(stats: TokenStats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """H in the objective's scope: the token's, its sequence's mean, or the previous step's mean."""
    entropy = jax.lax.stop_gradient(stats.entropy)
    scope = context.objective.entropy_scope
    if scope == "token":
        return entropy
    if scope == "batch":
        return jnp.where(
            rows.role == Role.SELF, context.entropy_self, context.entropy_demonstration
        )
    size = entropy.shape[0]  # no microbatch has more sequences than tokens
    totals = jax.ops.segment_sum(jnp.where(rows.loss_mask, entropy, 0.0), rows.sequence_ids, size)
    counts = jax.ops.segment_sum(rows.loss_mask.astype(jnp.float32), rows.sequence_ids, size)
    return _per_count(totals, counts)[rows.sequence_ids]


def sft_weight(entropy: Array, objective: Objective) -> Array:
    """a = demo_nll * exp(s H)."""
    return objective.demo_nll * jnp.exp(objective.demo_nll_entropy * entropy)


def rl_weight(entropy: Array, objective: Objective) -> Array:
    """w of good completions = self_positive * exp(s H)."""
    return objective.self_positive * jnp.exp(objective.self_positive_entropy * entropy)


def log_ratio(stats: TokenStats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """log p - log p_old; on policy its value is 0 and its gradient that of log p."""
    old = jax.lax.stop_gradient(stats.logprob) if context.on_policy else rows.old_logprobs
    return stats.logprob - old


def is_clipped(ratio: Array, advantage: Array, objective: Objective) -> Array:
    """Where the clipped branch is the smaller one, so that no gradient flows."""
    too_high = (advantage > 0) & (ratio > 1.0 + objective.clip_high)
    return too_high | ((advantage < 0) & (ratio < 1.0 - objective.clip_low))


def clipped(ratio: Array, advantage: Array, objective: Objective) -> Array:
    """min(r A, clip(r, 1 - low, 1 + high) A); a ratio on the bound itself keeps its gradient."""
    bounded = jnp.clip(ratio, 1.0 - objective.clip_low, 1.0 + objective.clip_high)
    return jnp.where(is_clipped(ratio, advantage, objective), bounded, ratio) * advantage


def _self_loss(stats: TokenStats, rows: Rows, context: LossContext, entropy: Array) -> Array:
    objective = context.objective
    positive = rl_weight(entropy, objective)
    if objective.self_form == "likelihood":
        return jnp.where(rows.correct, -positive, objective.self_negative) * stats.logprob
    weight = jnp.where(rows.advantage > 0, positive, objective.self_negative)
    return -weight * clipped(jnp.exp(log_ratio(stats, rows, context)), rows.advantage, objective)


def _demonstration_ratio(stats: TokenStats, objective: Objective) -> Array:
    """rho = p / (p + gamma), or p for gamma = 0."""
    p = jnp.exp(stats.logprob)
    return p / (p + objective.demo_ratio_gamma) if objective.demo_ratio_gamma else p


def loss_terms(
    stats: TokenStats, rows: Rows, context: LossContext
) -> dict[str, Float[Array, " N"]]:
    """Per-token loss by term, weighted and normalised; a term whose weight is 0 is absent."""
    objective = context.objective
    entropy = scoped_entropy(stats, rows, context)
    is_self = rows.loss_mask & (rows.role == Role.SELF)
    is_demo = rows.loss_mask & (rows.role == Role.DEMONSTRATION)
    nll_share = rows.inverse_length if objective.demo_aggregation == "sequences" else 1.0
    policy_share = rows.inverse_length if objective.policy_aggregation == "sequences" else 1.0
    normalisers = context.normalisers

    terms = {}
    if objective.demo_nll:
        nll = -sft_weight(entropy, objective) * stats.logprob * nll_share
        terms["demo_nll"] = _per_count(jnp.where(is_demo, nll, 0.0), normalisers.demonstration)
    if objective.demo_policy:
        gain = (
            objective.demo_policy
            * _demonstration_ratio(stats, objective)
            * rows.advantage
            * policy_share
        )
        terms["demo_policy"] = _per_count(jnp.where(is_demo, -gain, 0.0), normalisers.policy)
    if objective.self_form != "none":
        loss = _self_loss(stats, rows, context, entropy) * policy_share
        terms["self"] = _per_count(jnp.where(is_self, loss, 0.0), normalisers.policy)
    if objective.entropy_bonus:
        bonus = -objective.entropy_bonus * stats.entropy * policy_share
        terms["entropy_bonus"] = _per_count(
            jnp.where(is_self | is_demo, bonus, 0.0), normalisers.entropy
        )
    return terms


def token_objective(stats: TokenStats, rows: Rows, context: LossContext) -> Float[Array, " N"]:
    """The per-token loss that ops/head.py sums."""
    return sum(loss_terms(stats, rows, context).values(), start=jnp.zeros_like(stats.logprob))
