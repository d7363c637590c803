"""Kinds that judge the form of a completion, not its answer; made to be added to a reward."""

from collections.abc import Mapping
from typing import Any

from srft_jax.rewards.extraction import after_reasoning, find_boxes
from srft_jax.rewards.judging import judged, option
from srft_jax.rewards.verdicts import RewardResult

FORMAT_OPTIONS = {"boxed": False}
LENGTH_OPTIONS = {"unit": "characters", "full_at": 2048.0, "zero_at": 8192.0}


def format(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Give 1 for exactly one <think>...</think> with an answer behind it, in a box if `boxed`."""
    tail = after_reasoning(completion, require_think=True)
    boxed = option(metadata, "boxed", FORMAT_OPTIONS)
    return judged(bool(tail) and (not boxed or bool(find_boxes(tail or ""))))


def length(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Give 1 up to `full_at`, 0 from `zero_at` on, linear in between.

    If `full_at` is larger, it is the other way round: 1 from `full_at` on, 0 up to `zero_at`.

    In: 5,120 characters with full_at 2048 and zero_at 8192.  Out: 0.5.  With the unit `tokens` the
    length is the column num_tokens, which training fills in.
    """
    unit = option(metadata, "unit", LENGTH_OPTIONS)
    if unit not in ("characters", "tokens"):
        raise ValueError(f"option unit = {unit!r} is neither characters nor tokens")
    count = len(completion) if unit == "characters" else metadata["num_tokens"]
    full_at = option(metadata, "full_at", LENGTH_OPTIONS)
    zero_at = option(metadata, "zero_at", LENGTH_OPTIONS)
    if full_at == zero_at:
        raise ValueError(f"options full_at and zero_at are both {full_at:g}")
    reward = min(1.0, max(0.0, (count - zero_at) / (full_at - zero_at)))
    return RewardResult(reward, "right" if reward == 1 else "wrong")
