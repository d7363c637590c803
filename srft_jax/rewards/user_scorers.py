"""Scorers of the user's own, `package.module:function`, as verifiers."""

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from srft_jax.config import UsageError
from srft_jax.rewards.judging import Verifier
from srft_jax.rewards.verdicts import RewardResult

Arguments = Callable[[Mapping[str, Any]], dict[str, Any]]


def is_user_kind(kind: str) -> bool:
    """Whether the kind names a scorer of the user's own."""
    return ":" in kind


def load_scorer(kind: str) -> Verifier:
    """The function `f(completion, gold, **columns) -> float` as a verifier.

    It is given the columns that it has parameters for, or all of them where it has **columns.
    Completion and gold go to its first two parameters, whatever these are called.

    Raises:
        UsageError: no such module or function, parameters that cannot be read, as of some functions
            written in C, or `gold` before `completion`.
    """
    module, _, name = kind.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"reward function {kind} cannot be imported: {reason}") from error
    if not callable(function):
        raise UsageError(f"reward function {kind} is a {type(function).__name__}, not a function")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise UsageError(f"reward function {kind} does not say which parameters it has") from error
    if [one.name for one in parameters[:2]] == ["gold", "completion"]:
        raise UsageError(f"reward function {kind} takes gold first; the completion goes before it")
    arguments = _arguments(parameters)

    def verify(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
        reward = function(completion, gold, **arguments(metadata))
        if not isinstance(reward, numbers.Real) or not math.isfinite(float(reward)):
            raise TypeError(f"{kind} returned {reward!r}, not a finite number")
        return RewardResult(float(reward), "right" if float(reward) >= 1.0 else "wrong")

    return verify


def _arguments(parameters: Sequence[inspect.Parameter]) -> Arguments:
    """Which columns go to the function as keyword arguments."""
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    positional = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY][:2]
    columns = [one for one in named if one.name not in positional]

    def arguments(metadata: Mapping[str, Any]) -> dict[str, Any]:
        for one in columns:
            if one.default is one.empty and one.name not in metadata:
                there = ", ".join(metadata) or "none"
                raise TypeError(f"it needs the column '{one.name}'; the row's columns are: {there}")
        if takes_all:
            return {name: value for name, value in metadata.items() if name not in positional}
        return {one.name: metadata[one.name] for one in columns if one.name in metadata}

    return arguments
