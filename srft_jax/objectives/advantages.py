"""Rewards of a group to advantages."""

from collections.abc import Sequence

import numpy as np

from srft_jax.batch import Trajectory
from srft_jax.config import Objective


def group_advantages(
    rewards: Sequence[float],
    demonstration_rewards: Sequence[float],
    *,
    augmented: bool,
    divide_by_std: bool,
    baseline: Sequence[bool] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return A = (R - mean) / std of a group, with mean and std over its completions, or if
    `augmented` over completions and demonstrations.

    std has ddof = 1 and 1e-6 added; where it is 0 the quotient is taken to be 0. Where the rewards
    of the whole group are equal, every A is 0. If not `augmented`, the group is the completions: a
    right demonstration beside completions that are all wrong then has A = 0 too.
    In: rewards [1, 0, 0], demonstration [1], augmented, no std.  Out: [.5, -.5, -.5], [.5].

    Args:
        rewards: Rewards of the completions.
        demonstration_rewards: Rewards of the demonstrations, by the same verifier.
        augmented: Demonstrations count for the mean and the std.
        divide_by_std: Divide by std; otherwise A = R - mean.
        baseline: Which completions count for the mean and the std, by default all. A right one that
            does not count has A = 1 beside wrong ones that do. Where none counts, A is 0.
            In: rewards [1, 0, 0], baseline [False, True, True], no std.  Out: [1, 0, 0].

    Returns:
        Advantages of the completions and of the demonstrations, float32.
    """
    sampled = np.asarray(rewards, np.float64)
    demonstrated = np.asarray(demonstration_rewards, np.float64)
    in_baseline = np.ones(sampled.size, bool) if baseline is None else np.asarray(baseline, bool)
    counted, group = sampled[in_baseline], sampled
    if augmented:
        counted = np.concatenate([counted, demonstrated])
        group = np.concatenate([sampled, demonstrated])
    if not counted.size or np.ptp(group) == 0:
        return np.zeros(sampled.size, np.float32), np.zeros(demonstrated.size, np.float32)
    scale = 1.0
    if divide_by_std:
        scale = 1.0 / (np.std(counted, ddof=1) + 1e-6) if np.ptp(counted) else 0.0
    mean = counted.mean()
    return (
        ((sampled - mean) * scale).astype(np.float32),
        ((demonstrated - mean) * scale).astype(np.float32),
    )


def overlong_penalty(length: int, length_cap: int, buffer_share: float) -> float:
    """Return DAPO's soft penalty, which is added to the reward: 0, then falling to -1 at the cap.

    (length_cap - buffer - length) / buffer over the last buffer = buffer_share * length_cap tokens
    (arXiv 2503.14476).

    In: length 90, cap 100, share .2.  Out: -.5.
    """
    buffer = buffer_share * length_cap
    excess = length - (length_cap - buffer)
    return -min(excess / buffer, 1.0) if excess > 0 else 0.0


def overlong(trajectory: Trajectory, objective: Objective, length_cap: int) -> float:
    """Return what is added to the reward that advantages are taken over; at most 0."""
    if not objective.overlong_buffer:
        return 0.0
    return overlong_penalty(len(trajectory.tokens), length_cap, objective.overlong_buffer)
