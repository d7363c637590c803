"""Which column of a row holds which field: known schemas, or what `data.*.columns` says.

A row has the first schema in the table whose columns it all has:

    schema    is known by                               prompt    answer           demonstrations
    verl      prompt, reward_model.ground_truth         prompt    the latter       target
    chat      messages, ground_truth                    messages  ground_truth     the last turn
    chat      messages                                  messages  answer           the last turn
    arc       question, choices.text, answerKey         question  answerKey        -
    mmlu_pro  question, options, answer_index           question  answer_index     -
    gpqa      Question, Correct Answer, Incorrect ...   Question  Correct Answer   -
    plain     none of these                             prompt    answer           demonstrations

Where the table does not say otherwise, a row of any schema may have `demonstrations` (or a single
`demonstration`), `kind` and `behavior_logprobs`.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

from srft_jax.config import SourceConfig, UsageError

FIELDS = (
    "prompt",
    "answer",
    "demonstrations",
    "demonstration",
    "kind",
    "behavior_logprobs",
    "options",
    "labels",
)
REQUIRED = ("prompt", "answer")
OPTIONAL = ("demonstrations", "demonstration", "kind", "behavior_logprobs")

MAY_BE_NULL = (*OPTIONAL, "style")  # fields that a row does not have where they are null

Columns = str | tuple[str, ...]  # several columns are read as one list

MISSING = object()

SHOWN_COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Schema:
    """Where a row's fields stand.

    Args:
        name: Name in docs/data.md.
        marks: Columns by which a row of this schema is known.
        columns: Field -> column, dots going into nested ones.
        mapped: Fields whose column the user named: it must be there.
    """

    name: str
    marks: tuple[str, ...]
    columns: Mapping[str, Columns]
    mapped: tuple[str, ...] = ()


_OPTIONAL = {field: field for field in OPTIONAL}
_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _schema(name: str, *marks: str, **columns: Columns) -> Schema:
    return Schema(name, marks, {**_OPTIONAL, **columns})


PLAIN = _schema("plain", prompt="prompt", answer="answer")
SCHEMAS = (
    _schema(
        "verl",
        *("prompt", "reward_model.ground_truth"),
        prompt="prompt",
        answer="reward_model.ground_truth",
        demonstrations="target",
        style="reward_model.style",
    ),
    _schema("chat", "messages", "ground_truth", prompt="messages", answer="ground_truth"),
    _schema("chat", "messages", prompt="messages", answer="answer"),
    _schema(
        "arc",
        *("question", "choices.text", "answerKey"),
        prompt="question",
        options="choices.text",
        labels="choices.label",
        answer="answerKey",
    ),
    _schema(
        "mmlu_pro",
        *("question", "options", "answer_index"),
        prompt="question",
        options="options",
        answer="answer_index",
    ),
    _schema(
        "gpqa",
        *("Question", *_GPQA),
        prompt="Question",
        options=_GPQA,
        answer="Correct Answer",
    ),
)


def check_columns(key: str, source: SourceConfig) -> None:
    """Check that `columns` maps known fields, and the answer too if it maps the prompt.

    Raises:
        UsageError: names the key and what may have been meant.
    """
    for field in source.columns:
        if field not in FIELDS:
            close = difflib.get_close_matches(field, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"they are {', '.join(FIELDS)}."
            raise UsageError(f"{key}.columns: {field!r} is not a field of a row; {hint}")
    missing = "prompt" in source.columns and "answer" not in source.columns
    if missing and source.answer_from == "column":
        raise UsageError(f"{key}.columns has a prompt, but no answer.")


def schema_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Schema:
    """Return the schema of a row.

    A mapping that has the prompt says where everything stands, and the row's own names mean
    nothing; any other mapping changes fields of the schema that is recognised.
    """
    mapped = tuple(columns)
    if "prompt" in columns:
        return Schema("mapped", (), dict(columns), mapped)
    known = next((s for s in SCHEMAS if all(lookup(row, m) is not MISSING for m in s.marks)), PLAIN)
    return dataclasses.replace(known, columns={**known.columns, **columns}, mapped=mapped)


def lookup(row: Any, column: Columns) -> Any:
    """Return the value of a column, or MISSING. A column whose own name has dots goes first.

    In: {"a": {"b": [1, 2]}}, "a.b.0".  Out: 1.
    """
    if isinstance(column, tuple):
        values = [lookup(row, part) for part in column]
        return MISSING if any(value is MISSING for value in values) else values
    if isinstance(row, dict) and column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    if isinstance(row, dict) and first in row:
        return lookup(row[first], rest)
    if isinstance(row, list) and first.isdecimal() and int(first) < len(row):
        return lookup(row[int(first)], rest) if dot else row[int(first)]
    return MISSING


def whole_columns(schema: Schema) -> set[str]:
    """Return the columns that are read as a whole, not only a value nested in them."""
    columns: set[str] = set()
    for column in schema.columns.values():
        columns |= {column} if isinstance(column, str) else set(column)
    return columns


def missing_column(row: Mapping[str, Any], column: str) -> str:
    """Return the sentence about a column that is not there."""
    names = [name for name in row if name != column]
    if close := difflib.get_close_matches(column, names, n=1):
        return f"{column!r} is missing; did you mean {close[0]!r}?"
    if not names:
        return f"{column!r} is missing."
    there = ", ".join(names[:SHOWN_COLUMNS]) + (", ..." if len(names) > SHOWN_COLUMNS else "")
    return f"{column!r} is missing; the row has {there}, see `columns`."


def misspelt_fields(row: Mapping[str, Any], schema: Schema) -> list[str]:
    """Return sentences about columns that look like a field which the row does not have.

    In: {"prompt": "1+1", "answer": "2", "demonstratoins": []}.  Out: a sentence about the last.
    """
    if "prompt" in schema.mapped:
        return []
    absent = tuple(field for field in OPTIONAL if field not in row)
    others = row.keys() - whole_columns(schema)
    return [
        f"unknown field {name!r}; did you mean {field!r}?"
        for name in row
        if name in others and (field := _resembled(name, absent))
    ]


@functools.lru_cache(maxsize=4096)  # most rows of a file have the same columns
def _resembled(name: str, fields: tuple[str, ...]) -> str | None:
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)
    return close[0] if close else None
