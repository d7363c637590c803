"""The metrics of a step over its tokens.

Each microbatch gives sums, minima and maxima; a mean is divided once, by the whole step's count. So
no metric depends on how the step was split into microbatches, or over devices.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from srft_jax.batch import Metrics, Normalisers, Role, Rows, role_mask
from srft_jax.config import Objective
from srft_jax.objectives import loss as losses
from srft_jax.objectives.surrogates import is_clipped
from srft_jax.ops.head import ReferencedStats


class _Metric(NamedTuple):
    quantity: str  # key of `_quantities`; where the objective has none, there is no metric
    tokens: str  # key of `_masks` and `_counts`
    by: Literal["mean", "min", "max"] = "mean"


METRICS = {
    "policy/entropy_self": _Metric("entropy", "self"),
    "policy/entropy_demo": _Metric("entropy", "demonstration"),
    "policy/logprob_demo": _Metric("logprob", "demonstration"),
    "policy/sampler_kl": _Metric("sampler_kl", "self"),
    "policy/sampler_max_difference": _Metric("sampler_difference", "sampled", "max"),
    "policy/clip_fraction": _Metric("clipped", "self"),
    "policy/clip_fraction_low": _Metric("clipped_low", "self"),
    "policy/clip_fraction_high": _Metric("clipped_high", "self"),
    "policy/ratio_mean": _Metric("ratio", "self"),
    "policy/ratio_min": _Metric("ratio", "self", "min"),
    "policy/ratio_max": _Metric("ratio", "self", "max"),
    "policy/reference_kl": _Metric("reference_kl", "reference"),
    "weights/sft": _Metric("sft_weight", "demonstration"),
    "weights/sft_min": _Metric("sft_weight", "demonstration", "min"),
    "weights/sft_max": _Metric("sft_weight", "demonstration", "max"),
    "weights/rl": _Metric("rl_weight", "positive"),
    "weights/rl_min": _Metric("rl_weight", "positive", "min"),
    "weights/rl_max": _Metric("rl_weight", "positive", "max"),
    "weights/importance": _Metric("importance", "self"),
}


class _Reduction(NamedTuple):
    within: Callable[..., Array]  # values of a microbatch's tokens -> one value
    between: Callable[[Array, Array], Array]  # values of two microbatches -> one value
    neutral: float  # value of a microbatch without tokens, which changes nothing


_REDUCTIONS = {
    "mean": _Reduction(jnp.sum, jnp.add, 0.0),
    "min": _Reduction(jnp.min, jnp.minimum, math.inf),
    "max": _Reduction(jnp.max, jnp.maximum, 0.0),  # nothing here is negative
}


def _masks(rows: Rows, objective: Objective) -> dict[str, Array]:
    """Masks [N] of the tokens that metrics are taken over, by the name in `_Metric.tokens`."""
    self_tokens = role_mask(rows, Role.SELF)
    demonstration = role_mask(rows, Role.DEMONSTRATION)
    return {
        "self": self_tokens,
        "positive": self_tokens & losses.is_positive(rows, objective),
        "demonstration": demonstration,
        # The sampler scores forced tokens too.
        "sampled": role_mask(rows, Role.SELF, Role.HINT, Role.PREFIX),
        "reference": self_tokens if objective.kl_role == "self" else demonstration,
    }


def _counts(normalisers: Normalisers, objective: Objective) -> dict[str, Array]:
    """Number of each mask's tokens in the whole step.

    "sampled" counts SELF tokens alone: its metrics are maxima, which no count divides.
    """
    is_self = objective.kl_role == "self"
    return {
        "self": normalisers.self_tokens,
        "positive": normalisers.positive_tokens,
        "demonstration": normalisers.demonstration_tokens,
        "sampled": normalisers.self_tokens,
        "reference": normalisers.self_tokens if is_self else normalisers.demonstration_tokens,
    }


def _quantities(stats: losses.Stats, rows: Rows, context: losses.LossContext) -> dict[str, Array]:
    """Values of each token [N], by the name in `_Metric.quantity`; what an objective does not
    compute is absent."""
    objective = context.objective
    difference = stats.logprob - rows.sampler_logprobs
    quantities = {
        "logprob": stats.logprob,
        "entropy": stats.entropy,
        "sampler_kl": jnp.expm1(difference) - difference,
        "sampler_difference": jnp.abs(difference),
        "sft_weight": losses.sft_weight(stats, rows, context),
        "rl_weight": losses.rl_weight(stats, rows, context),
    }
    if objective.self_form == "policy_gradient":
        ratio = losses.ratio(stats, rows, context)
        low, high = is_clipped(ratio, rows.advantage, objective)
        clips = {"clipped": low | high, "clipped_low": low, "clipped_high": high}
        quantities |= clips | {"ratio": ratio}
    if objective.old_logprobs == "trainer":
        quantities["importance"] = losses.importance_weight(stats, rows, context)
    if isinstance(stats, ReferencedStats):
        quantities["reference_kl"] = stats.kl
    return quantities


def microbatch_metrics(stats: losses.Stats, rows: Rows, context: losses.LossContext) -> Metrics:
    """Return what `combine` takes: sums over a microbatch's tokens, minima and maxima, and its
    share of each loss term."""
    masks, quantities = _masks(rows, context.objective), _quantities(stats, rows, context)
    values = {}
    for name, metric in METRICS.items():
        if metric.quantity in quantities:
            reduction = _REDUCTIONS[metric.by]
            tokens = jnp.where(masks[metric.tokens], quantities[metric.quantity], reduction.neutral)
            values[name] = reduction.within(tokens)
    terms = losses.loss_terms(stats, rows, context)
    return values | {f"loss/{name}": jnp.sum(term) for name, term in terms.items()}


def _reduction(name: str) -> _Reduction:
    """How a metric is reduced; loss terms, which the table does not name, are summed."""
    return _REDUCTIONS[METRICS[name].by if name in METRICS else "mean"]


def initial_metrics(names: Iterable[str]) -> Metrics:
    """Return the values before the first microbatch, which `combine` starts from."""
    return {name: jnp.float32(_reduction(name).neutral) for name in names}


def combine(total: Metrics, part: Metrics) -> Metrics:
    """Return the values of the microbatches so far, with those of one more."""
    return {name: _reduction(name).between(total[name], value) for name, value in part.items()}


def step_metrics(total: Metrics, normalisers: Normalisers, objective: Objective) -> Metrics:
    """Return means, minima and maxima over all microbatches; 0 over no tokens, which `present`
    leaves out.

    Loss terms are divided already, each by its own normaliser.
    """
    counts, values = _counts(normalisers, objective), dict(total)
    for name, metric in METRICS.items():  # in one order, as every process must trace one program
        if name in total:
            count = counts[metric.tokens]
            divisor = jnp.maximum(count, 1.0) if metric.by == "mean" else 1.0
            values[name] = jnp.where(count > 0, total[name] / divisor, 0.0)
    return values


def present(metrics: Metrics, normalisers: Normalisers, objective: Objective) -> Metrics:
    """Drop metrics whose token mask is empty."""
    counts = _counts(normalisers, objective)
    return {
        name: value
        for name, value in metrics.items()
        if name not in METRICS or counts[METRICS[name].tokens]
    }
