"""From a row to an example, or to everything that is wrong with it."""

from collections.abc import Mapping
from typing import Any

from srft_jax.config import SourceConfig
from srft_jax.data import fields
from srft_jax.data.answers import TAKEN_FROM
from srft_jax.data.choices import pose, right_option
from srft_jax.data.examples import Example, Turn
from srft_jax.data.fields import Cell, Problems
from srft_jax.data.schemas import (
    MAY_BE_NULL,
    MISSING,
    REQUIRED,
    Schema,
    lookup,
    missing_column,
    misspelt_fields,
    schema_of,
)
from srft_jax.data.source_rows import Row, type_name

Cells = Mapping[str, Cell]  # by field


class BadRow(ValueError):
    """A row that no example can be made of.

    Attributes:
        problems: What is wrong with it, one sentence each.
    """

    def __init__(self, problems: Problems) -> None:
        super().__init__(" ".join(problems))
        self.problems = problems


def read_example(row: Row, source: SourceConfig, number: int = 0) -> Example:
    """Return the example that a row is.

    Args:
        row: The row as it was read.
        source: Configuration of its source.
        number: Number of the source in a mixture.

    Raises:
        BadRow: holds every problem of the row.
    """
    if row.problem is not None:
        raise BadRow([row.problem])
    if not isinstance(row.value, dict):
        what = type_name(row.value)
        raise BadRow([f"{what}, but a row is an object with {' and '.join(REQUIRED)}."])
    schema = schema_of(row.value, source.columns)
    problems = misspelt_fields(row.value, schema)
    cells = _cells(row.value, schema, source, problems)
    example = _example(cells, source, problems) if REQUIRED[0] in cells else {}
    if problems:
        raise BadRow(problems)
    metadata = row.value | example.pop("metadata")
    return Example(**example, metadata=metadata, source=number, where=row.where)


def _cells(
    row: Mapping[str, Any], schema: Schema, source: SourceConfig, problems: Problems
) -> Cells:
    """Return what the columns hold; an optional field is left out where it is null.

    Where the answer's column is also an option's column, the answer is the option's number: GPQA
    has options whose texts are letters.
    """
    cells = {}
    options = schema.columns.get("options")
    parts = options if isinstance(options, tuple) else ()
    for field, column in schema.columns.items():
        value = lookup(row, column)
        if column in parts and value is not MISSING:
            value = parts.index(column)
        required = field not in MAY_BE_NULL
        if field == "answer" and source.answer_from != "column":
            required = False  # it may stand in the demonstration
        if value is MISSING and (required or field in schema.mapped):
            problems.append(missing_column(row, str(column)))
        elif value is not MISSING and (value is not None or required):
            cells[field] = Cell(repr(column) if isinstance(column, str) else "options", value)
    return cells


def _example(cells: Cells, source: SourceConfig, problems: Problems) -> dict[str, Any]:
    """Return arguments for `Example`; they are right only if no problem was found."""
    history, prompt, demonstrations = _conversation(cells["prompt"], problems)
    demonstrations += _demonstrations(cells, problems)
    example: dict[str, Any] = {"history": history, "metadata": {}}
    if "options" in cells:
        shuffle = source.shuffle_options and not demonstrations
        prompt, answer, choices = _choices(cells, prompt, shuffle, problems)
        example["metadata"] = {"choices": choices}
    else:
        answer = _answer(cells, demonstrations, source, problems)
    if "behavior_logprobs" in cells:
        example["behavior_logprobs"] = fields.logprobs(
            cells["behavior_logprobs"], len(demonstrations), problems
        )
    if (kind := _kind(cells, source, problems)) is not None:
        example["kind"] = kind
    return example | {
        "prompt": prompt,
        "answer": answer,
        "demonstrations": tuple(demonstrations),
    }


def _conversation(cell: Cell, problems: Problems) -> tuple[tuple[Turn, ...], str, list[str]]:
    """Return history, prompt, and as demonstrations the last turn if it is the assistant's."""
    before = len(problems)
    turns = fields.turns(cell, problems)
    demonstrations = [turns.pop().content] if turns and turns[-1].role == "assistant" else []
    if not turns or turns[-1].role != "user":
        if len(problems) == before:
            problems.append(f"{cell.name} has no user turn at its end to be answered.")
        return (), "", demonstrations
    return tuple(turns[:-1]), turns[-1].content, demonstrations


def _demonstrations(cells: Cells, problems: Problems) -> list[str]:
    columns = [cells[name] for name in ("demonstrations", "demonstration") if name in cells]
    if len(columns) == 2:
        problems.append(f"both {columns[0].name} and {columns[1].name}; give one of them.")
    return [text for cell in columns for text in fields.texts(cell, problems)]


def _answer(
    cells: Cells, demonstrations: list[str], source: SourceConfig, problems: Problems
) -> str:
    """Return the gold answer, out of its column or out of the first demonstration."""
    if source.answer_from == "column":
        return fields.answer(cells["answer"], problems) if "answer" in cells else ""
    take, mark = TAKEN_FROM[source.answer_from]
    if "answer" not in cells and not demonstrations:
        problems.append(
            f"neither an answer nor a demonstration that it could be taken from ({mark})."
        )
        return ""
    cell = cells.get("answer") or Cell("the demonstration", demonstrations[0])
    text = fields.text(cell, problems)
    answer = take(text)
    if text and answer is None:
        problems.append(f"{cell.name} has no answer in {mark}.")
    return answer or ""


def _choices(
    cells: Cells, question: str, shuffle: bool, problems: Problems
) -> tuple[str, str, list[str]]:
    """Return prompt, letter of the right option, and the options in the order of their letters."""
    options = fields.options(cells["options"], problems)
    labels = fields.options(cells["labels"], problems) if "labels" in cells else []
    answer = cells.get("answer", Cell("", None))
    if len(labels) not in (0, len(options)):
        problems.append(f"{len(options)} options, but {len(labels)} labels.")
    right = right_option(answer.value, options, labels)
    if right is None:
        problems.append(
            f"{answer.name} is neither the number nor the label nor the text of one option."
        )
    if problems or right is None:
        return "", "", []
    return pose(question, options, right, shuffle=shuffle)


def _kind(cells: Cells, source: SourceConfig, problems: Problems) -> str | None:
    """Return the row's own verifier, else the source's, else its schema's; None for the default."""
    if "kind" in cells:
        return fields.text(cells["kind"], problems)
    if source.kind is not None:
        return source.kind
    if "options" in cells:
        return "multiple_choice"
    if "style" not in cells:
        return None
    name, style = cells["style"]
    # rule, and DAPO's rule-lighteval/MATH_v2; another style is a reward model, which is not here.
    if not isinstance(style, str) or not style.startswith("rule"):
        problems.append(f"{name} is not 'rule', so that the row names no verifier; set `kind`.")
    return "math"
