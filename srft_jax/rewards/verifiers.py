"""Verifiers: (completion, gold, metadata) -> RewardResult, pure, and in time linear in the text.

Completions are hostile: what a policy can write to raise its reward or to stop the run, it will.
So nothing here evaluates text, and numbers are read by a strict pattern from a short string only.
"""

import importlib
import math
import numbers
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from srft_jax.config import UsageError
from srft_jax.rewards import procedural
from srft_jax.rewards.requests import RewardResult

Verifier = Callable[[str, str, Mapping[str, Any]], RewardResult]

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
MAX_TAIL = 4096  # characters after the reasoning, blanks included
MAX_ANSWER = 512  # characters of the answer itself

# 12, -0.5, .5, 3., 3/4. No exponent: Fraction("1e999999999") would compute it. No zero denominator.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+/0*[1-9][0-9]*|[0-9]+\.?[0-9]*|\.[0-9]+)")


def final_answer(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compares what follows the reasoning with gold, as a string or as a number.

    In: "<think>\\n2 * 3 = 6, 6 + 1.5 = 7.5\\n</think>\\n15/2", gold "7.5".  Out: right.

    The verdict is `unparsed` unless the completion opens a think tag and then closes it, once each,
    and goes on with an answer of 1 to 512 characters (4,096 with the blanks around it).
    """
    answer = _answer(completion)
    if answer is None:
        return RewardResult(0.0, "unparsed")
    return _judged(_same(answer, gold.strip()))


def exact(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compares the whole completion with gold, blanks around either not counted."""
    text = completion.strip()
    return _judged(text == gold.strip()) if text else RewardResult(0.0, "unparsed")


KINDS: Mapping[str, Verifier] = {"final_answer": final_answer, "exact": exact, **procedural.KINDS}


def is_user_kind(kind: str) -> bool:
    """Whether the kind names a scorer of the user's own, `package.module:function`."""
    return ":" in kind


def load(kind: str) -> Verifier:
    """The verifier of a kind. A user's scorer is `f(completion, gold, **metadata) -> float`.

    Raises:
        UsageError: no such kind, module or function.
    """
    if is_user_kind(kind):
        return _user_verifier(kind)
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UsageError(
            f"unknown reward kind '{kind}': neither {known} nor package.module:function"
        )
    return KINDS[kind]


def _judged(right: bool) -> RewardResult:
    return RewardResult(1.0, "right") if right else RewardResult(0.0, "wrong")


def _answer(completion: str) -> str | None:
    if completion.count(OPEN_TAG) != 1 or completion.count(CLOSE_TAG) != 1:
        return None
    reasoning, _, tail = completion.partition(CLOSE_TAG)
    if OPEN_TAG not in reasoning or len(tail) > MAX_TAIL:
        return None
    answer = tail.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def _same(answer: str, gold: str) -> bool:
    if answer == gold:
        return True
    value = _number(answer)
    return value is not None and value == _number(gold)


def _number(text: str) -> Fraction | None:
    return Fraction(text) if len(text) <= MAX_ANSWER and _NUMBER.fullmatch(text) else None


def _user_verifier(kind: str) -> Verifier:
    module, _, name = kind.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"reward function {kind} cannot be imported: {reason}") from error
    if not callable(function):
        raise UsageError(f"reward function {kind} is a {type(function).__name__}, not a function")

    def verify(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
        reward = function(completion, gold, **metadata)
        if not isinstance(reward, numbers.Real) or not math.isfinite(float(reward)):
            raise TypeError(f"{kind} returned {reward!r}, not a finite number")
        return RewardResult(float(reward), "right" if float(reward) >= 1.0 else "wrong")

    return verify
