"""Rewards of a group to advantages."""

from collections.abc import Sequence

import numpy as np


def group_advantages(
    rewards: Sequence[float],
    demonstration_rewards: Sequence[float],
    *,
    augmented: bool,
    divide_by_std: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """A = (R - mean) / std over the completions, or if `augmented` over demonstrations as well.

    std has ddof = 1 and 1e-6 added. Where the rewards that count are all equal, every A is 0, also
    that of a right demonstration beside wrong completions if not `augmented`.
    In: rewards [1, 0, 0], demonstration [1], augmented, no std.  Out: [.5, -.5, -.5], [.5].

    Returns:
        Advantages of the completions and of the demonstrations, float32.
    """
    own, given = np.asarray(rewards, np.float64), np.asarray(demonstration_rewards, np.float64)
    group = np.concatenate([own, given]) if augmented else own
    if group.size == 0 or np.ptp(group) == 0:
        scale = 0.0
    else:
        scale = 1.0 / (np.std(group, ddof=1) + 1e-6) if divide_by_std else 1.0
    mean = group.mean() if group.size else 0.0
    return ((own - mean) * scale).astype(np.float32), ((given - mean) * scale).astype(np.float32)
