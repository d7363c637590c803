"""A user's own scorers, `package.module:function`, as verifiers."""

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
    """Tell whether the kind names a user's own scorer."""
    return ":" in kind


def load_scorer(kind: str) -> Verifier:
    """Import the function `f(completion, gold, **columns) -> float` and make it a verifier.

    Completion and gold go to its first two parameters, whatever their names. Columns go to the
    parameters of their names, or all of them to `**columns`.

    Raises:
        UsageError: no such module or function; parameters that cannot be read, as with some
            functions written in C; or `gold` before `completion`.
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
    # A likely mistake: gold would be judged as if it were the completion.
    if [parameter.name for parameter in parameters[:2]] == ["gold", "completion"]:
        raise UsageError(f"reward function {kind} takes gold first; the completion goes before it")
    arguments = _arguments(parameters)

    def verify(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
        reward = function(completion, gold, **arguments(metadata))
        if not isinstance(reward, numbers.Real) or not math.isfinite(float(reward)):
            raise TypeError(f"{kind} returned {reward!r}, not a finite number")
        return RewardResult(float(reward), "right" if float(reward) >= 1.0 else "wrong")

    return verify


def _arguments(parameters: Sequence[inspect.Parameter]) -> Arguments:
    """The function that picks a row's columns for these parameters, by their names.

    In: (completion, gold, level, source="x") and the row {"level": 3, "n": 1}.  Out: {"level": 3}.
    """
    positional = [
        parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY
    ][:2]  # completion and gold: never taken from columns
    named = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in positional
    ]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def arguments(metadata: Mapping[str, Any]) -> dict[str, Any]:
        for parameter in named:
            if parameter.default is parameter.empty and parameter.name not in metadata:
                columns = ", ".join(metadata) or "none"
                raise TypeError(
                    f"it needs the column '{parameter.name}'; the row's columns are: {columns}"
                )
        if takes_all:
            return {name: value for name, value in metadata.items() if name not in positional}
        names = [parameter.name for parameter in named]
        return {name: metadata[name] for name in names if name in metadata}

    return arguments
