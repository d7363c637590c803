"""Rewards of a group to advantages."""

from collections.abc import Sequence

import numpy as np


def group_advantages(
    rewards: Sequence[float],
    demonstration_rewards: Sequence[float],
    *,
    augmented: bool,
    divide_by_std: bool,
    baseline: Sequence[bool] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A = (R - mean) / std over the completions, or if `augmented` over demonstrations as well.

    std has ddof = 1 and 1e-6 added; where it is 0 the quotient is taken to be 0. Where the whole
    group's rewards are equal, every A is 0, also that of a right demonstration beside wrong
    completions if not `augmented`.
    In: rewards [1, 0, 0], demonstration [1], augmented, no std.  Out: [.5, -.5, -.5], [.5].

    Args:
        rewards: Of the completions.
        demonstration_rewards: Of the demonstrations, by the same verifier.
        augmented: Demonstrations count for the mean and the std.
        divide_by_std: Otherwise A = R - mean.
        baseline: Which completions count for the mean and the std, by default all; a right one that
            does not count keeps its A = 1 beside wrong ones that do. Where none counts, A is 0.
            In: rewards [1, 0, 0], baseline [False, True, True], no std.  Out: [1, 0, 0].

    Returns:
        Advantages of the completions and of the demonstrations, float32.
    """
    own, given = np.asarray(rewards, np.float64), np.asarray(demonstration_rewards, np.float64)
    in_baseline = np.ones(own.size, bool) if baseline is None else np.asarray(baseline, bool)
    counted = own[in_baseline]
    group = own
    if augmented:
        counted, group = np.concatenate([counted, given]), np.concatenate([own, given])
    if not counted.size or np.ptp(group) == 0:
        return np.zeros(own.size, np.float32), np.zeros(given.size, np.float32)
    scale = 1.0
    if divide_by_std:
        scale = 1.0 / (np.std(counted, ddof=1) + 1e-6) if np.ptp(counted) else 0.0
    mean = counted.mean()
    return ((own - mean) * scale).astype(np.float32), ((given - mean) * scale).astype(np.float32)


def overlong_penalty(length: int, length_cap: int, buffer_share: float) -> float:
    """DAPO's soft penalty, to be added to the reward: 0, then falling to -1 at the length cap.

    With a buffer of buffer_share * length_cap tokens: (length_cap - buffer - length) / buffer over
    the last of them. In: length 90, cap 100, share .2.  Out: -.5.
    """
    buffer = buffer_share * length_cap
    excess = length - (length_cap - buffer)
    return -min(excess / buffer, 1.0) if excess > 0 else 0.0
