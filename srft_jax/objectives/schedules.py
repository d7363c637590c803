"""Schedules, values that go by the step: mixing weights, lengths of prefixes, their tokens."""

import math
from collections.abc import Sequence

import numpy as np

from srft_jax.config import Objective


def _cosine(start: float, end: float, num_steps: int, step: int) -> float:
    """`start` at step 0, `end` from step num_steps on, half a cosine in between."""
    progress = min(step / num_steps, 1.0) if num_steps else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def mix_weights(objective: Objective, stage_step: int) -> tuple[float, float]:
    """Return `TrainingSequence.weight` of demonstrations and of completions: mu and 1 - mu, or 1
    and 1 where the terms are summed.

    Args:
        objective: Its mix_start, mix_end and mix_steps give mu.
        stage_step: Number of the step within its stage, from 0.
    """
    if objective.mix == "sum":
        return 1.0, 1.0
    mu = _cosine(objective.mix_start, objective.mix_end, objective.mix_steps, stage_step)
    return mu, 1.0 - mu


def prefix_length(
    objective: Objective, stage_step: int, num_tokens: int, rng: np.random.Generator
) -> int:
    """Return how many tokens of a demonstration a completion starts with; at least one is left to
    generate.

    UFT: as many of `prefix_chunks` equal chunks as Binomial(chunks, share) says, where the share
    falls from prefix_start to prefix_end. Prefix-RFT (no chunks): a share drawn uniformly between
    that falling value and prefix_start, so that ever shorter prefixes join the long ones.

    Args:
        objective: Its coefficients `prefix_*` are the schedule.
        stage_step: Number of the step within its stage, from 0; from prefix_until on the length is
            0.
        num_tokens: Tokens of the whole demonstration, EOS included.
        rng: Generator to draw from.
    """
    if stage_step >= objective.prefix_until:
        return 0
    share = _cosine(
        objective.prefix_start, objective.prefix_end, objective.prefix_steps, stage_step
    )
    if objective.prefix_chunks:
        share = rng.binomial(objective.prefix_chunks, share) / objective.prefix_chunks
    else:
        share = rng.uniform(share, objective.prefix_start)
    return max(min(round(share * num_tokens), num_tokens - 1), 0)


def longest_prefix(objective: Objective, num_tokens: int) -> int:
    """Return the most tokens that `prefix_length` returns at any step, 0 without prefixes."""
    if objective.prefix == "none" or not objective.prefix_until:
        return 0
    share = max(objective.prefix_start, objective.prefix_end)
    if objective.prefix_chunks and share:
        share = 1.0  # all chunks may be drawn
    return max(min(round(share * num_tokens), num_tokens - 1), 0)


def top_entropy(entropies: Sequence[float] | np.ndarray, share: float) -> np.ndarray:
    """Return which tokens have the highest entropy, bool: this share of them, at least one.

    In: entropies [.1, 2., .5, .3, 0.], share .4.  Out: [False, True, True, False, False].
    """
    values = np.asarray(entropies, np.float64)
    chosen = np.zeros(values.shape, bool)
    chosen[np.argsort(-values, kind="stable")[: max(round(share * values.size), 1)]] = True
    return chosen
