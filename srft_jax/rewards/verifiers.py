"""The table of kinds. A verifier is (completion, gold, metadata) -> RewardResult, and pure.

Its options are columns of the row, or set for a whole run, and have the defaults of `OPTIONS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from srft_jax.config import UsageError
from srft_jax.rewards import answer_kinds, choices, math, procedural, shaping
from srft_jax.rewards.answer_kinds import exact, final_answer, numeric, regex
from srft_jax.rewards.judging import Verifier, option
from srft_jax.rewards.user_scorers import is_user_kind, load_scorer

KINDS: Mapping[str, Verifier] = {
    "final_answer": final_answer,
    "exact": exact,
    "math": math.math,
    "numeric": numeric,
    "multiple_choice": choices.multiple_choice,
    "regex": regex,
    "format": shaping.format,
    "length": shaping.length,
    **procedural.KINDS,
}

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "math": math.MATH_OPTIONS,
    "numeric": answer_kinds.NUMERIC_OPTIONS,
    "multiple_choice": choices.CHOICE_OPTIONS,
    "regex": answer_kinds.REGEX_OPTIONS,
    "format": shaping.FORMAT_OPTIONS,
    "length": shaping.LENGTH_OPTIONS,
    **dict.fromkeys(procedural.KINDS, procedural.PROCEDURAL_OPTIONS),
}

# Columns beside its options that a kind looks at.
COLUMNS: Mapping[str, Sequence[str]] = {
    "multiple_choice": ("choices",),
    "countdown": ("numbers",),
    "length": ("num_tokens",),
}

# What a kind loads that takes long, once for all workers.
PRELOADS = {"math": math.load}


def check_kind(kind: str) -> None:
    """Raises UsageError if there is no such kind; a user's scorer is looked at by `load` alone."""
    if not is_user_kind(kind) and kind not in KINDS:
        known = ", ".join(KINDS)
        raise UsageError(
            f"unknown reward kind '{kind}': neither {known} nor package.module:function"
        )


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError on what the kind has no option for, or not of that type.

    A user's scorer gets them as keyword arguments; whether it takes them is seen on its probes.
    """
    check_kind(kind)
    if is_user_kind(kind):
        return
    defaults = OPTIONS.get(kind, {})
    for name in options:
        if name not in defaults:
            known = ", ".join(defaults) or "none"
            raise UsageError(f"reward kind {kind} has no option '{name}'; its options: {known}")
        try:
            option(options, name, defaults)
        except (TypeError, ValueError) as error:
            raise UsageError(f"reward kind {kind}: {error}") from error


def columns_of(
    kind: str, metadata: Mapping[str, Any], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What a kind gets of a row: a user's scorer all of it, others what they look at.

    `options` stand in for what the row does not have or has as null.
    """
    columns = {**metadata, **{k: v for k, v in options.items() if metadata.get(k) is None}}
    if is_user_kind(kind):
        return columns
    read = {*OPTIONS.get(kind, ()), *COLUMNS.get(kind, ())}
    return {name: value for name, value in columns.items() if name in read}


def row_problem(kind: str, gold: str, metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with a row of one of our kinds, whatever is completed.

    Verifiers look at gold first, so an empty completion shows it, within microseconds.
    """
    if is_user_kind(kind):
        return None
    try:
        verifier, defaults = load(kind), OPTIONS.get(kind, {})
        for name in defaults:
            option(metadata, name, defaults)
        verifier("", gold, metadata)
    except UsageError as error:
        return f"{error}."
    except (TypeError, ValueError) as error:
        return f"kind {kind}: {error}."
    return None


def load(kind: str) -> Verifier:
    """The verifier of a kind.

    Raises:
        UsageError: no such kind, module or function.
    """
    check_kind(kind)
    return load_scorer(kind) if is_user_kind(kind) else KINDS[kind]
