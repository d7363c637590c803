"""The table of kinds. A verifier is a pure function (completion, gold, metadata) -> RewardResult.

Its options are columns of the row or are set for a whole run, with the defaults in `OPTIONS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from srft_jax.config import UsageError
from srft_jax.rewards import answer_kinds, math, multiple_choice, procedural, shaping
from srft_jax.rewards.answer_kinds import exact, final_answer, numeric, regex
from srft_jax.rewards.judging import Verifier, option
from srft_jax.rewards.user_scorers import is_user_kind, load_scorer

KINDS: Mapping[str, Verifier] = {
    "final_answer": final_answer,
    "exact": exact,
    "math": math.math,
    "numeric": numeric,
    "multiple_choice": multiple_choice.multiple_choice,
    "regex": regex,
    "format": shaping.format,
    "length": shaping.length,
    **procedural.KINDS,
}

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "math": math.MATH_OPTIONS,
    "numeric": answer_kinds.NUMERIC_OPTIONS,
    "multiple_choice": multiple_choice.CHOICE_OPTIONS,
    "regex": answer_kinds.REGEX_OPTIONS,
    "format": shaping.FORMAT_OPTIONS,
    "length": shaping.LENGTH_OPTIONS,
    **dict.fromkeys(procedural.KINDS, procedural.PROCEDURAL_OPTIONS),
}

# Columns that a kind reads beside its options.
COLUMNS: Mapping[str, Sequence[str]] = {
    "multiple_choice": ("choices",),
    "countdown": ("numbers",),
    "length": ("num_tokens",),
}

# Slow imports of a kind, done once for all workers.
PRELOADS = {"math": math.load_math_verify}


def check_kind(kind: str) -> None:
    """Raise UsageError if there is no such kind; only `load_verifier` looks for a user's scorer."""
    if not is_user_kind(kind) and kind not in KINDS:
        known = ", ".join(KINDS)
        raise UsageError(
            f"unknown reward kind '{kind}': neither {known} nor package.module:function"
        )


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError on an option that the kind lacks, or that has another type.

    A user's scorer gets options as keyword arguments; its probes show whether it takes them.
    """
    check_kind(kind)
    if is_user_kind(kind):
        return
    defaults = OPTIONS.get(kind, {})
    for name in options:  # each has a default, whose type it must have
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
    """Return the columns that a kind is given: a user's scorer all, others those they read.

    A column that the row lacks or has as null is taken from `options`.
    """
    missing = {name: value for name, value in options.items() if metadata.get(name) is None}
    columns = {**metadata, **missing}
    if is_user_kind(kind):
        return columns
    read = {*OPTIONS.get(kind, ()), *COLUMNS.get(kind, ())}
    return {name: value for name, value in columns.items() if name in read}


def row_problem(kind: str, gold: str, metadata: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a row of one of our kinds, as a sentence, whatever the completion.

    Verifiers look at gold first, so an empty completion shows the error within microseconds.
    """
    if is_user_kind(kind):
        return None
    try:
        verifier, defaults = load_verifier(kind), OPTIONS.get(kind, {})
        for name in defaults:
            option(metadata, name, defaults)
        verifier("", gold, metadata)
    except UsageError as error:
        return f"{error}."
    except (TypeError, ValueError) as error:
        return f"kind {kind}: {error}."
    return None


def load_verifier(kind: str) -> Verifier:
    """Return the verifier of a kind.

    Raises:
        UsageError: no such kind, module or function.
    """
    check_kind(kind)
    return load_scorer(kind) if is_user_kind(kind) else KINDS[kind]
