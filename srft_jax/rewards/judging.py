"""The parts that all verifiers share: their type, results, and the options that rows may set."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from srft_jax.rewards.verdicts import RewardResult

Verifier = Callable[[str, str, Mapping[str, Any]], RewardResult]

UNPARSED = RewardResult(0.0, "unparsed")


def judged(right: bool) -> RewardResult:
    """Return reward 1 and `right`, or reward 0 and `wrong`."""
    return RewardResult(1.0, "right") if right else RewardResult(0.0, "wrong")


def option(metadata: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> Any:
    """Return the row's column of that name; the default if it is absent or null (Arrow's filler).

    Raises:
        TypeError: the value has another type than the default.
        ValueError: the value is a number that is negative or not finite.
    """
    value, default = metadata.get(name), defaults[name]
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number if isinstance(default, float) else type(value) is type(default):
        if is_number and not 0 <= value < math.inf:
            raise ValueError(f"option {name} = {value!r} is negative or not finite")
        return value
    raise TypeError(f"option {name} = {value!r} is not a {type(default).__name__}")
