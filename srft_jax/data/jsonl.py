"""The user's own data: files of one JSON object a line.

    {"prompt": "7+5*3", "answer": "6", "demonstrations": ["<think>2 6</think>6"]}
    {"prompt": "91+46", "answer": "137"}

`demonstrations` may be left out, or be a single string called `demonstration`; `kind` names the
verifier. Every row is checked before anything is built from it. Rows count from 1 and every line is
a row, so that row numbers are the line numbers of an editor.
"""

import difflib
import json
from typing import Any

from etils import epath

from srft_jax.config import JsonlConfig, UsageError
from srft_jax.data.examples import Example, ExampleSets
from srft_jax.data.problems import raise_problems

REQUIRED = ("prompt", "answer")
FIELDS = (*REQUIRED, "demonstrations", "demonstration", "kind")
TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def read_sets(config: JsonlConfig) -> ExampleSets:
    """The user's files; a set without a file is empty.

    Raises:
        UsageError: A file is missing, empty or has bad rows.
    """
    files = {"held_out": config.held_out, "ood": config.ood}
    return ExampleSets(
        train=read_examples(config.train),
        evaluation={name: read_examples(file) for name, file in files.items() if file is not None},
    )


def read_examples(path: str) -> tuple[Example, ...]:
    """The rows of one file, in order: row n is element n - 1.

    Raises:
        UsageError: The file is missing or empty, or rows are bad; names the file and the rows.
    """
    rows: list[Any] = []
    problems: list[str] = []
    for number, line in enumerate(_read_lines(path), start=1):
        row, found = parse_row(line)
        rows.append(row)
        problems += [f"{path}, row {number}: {problem}" for problem in found]
    raise_problems(problems)
    return tuple(map(make_example, rows))


def parse_row(line: bytes) -> tuple[Any, list[str]]:
    """The JSON value of a line, and what is wrong with it as a row."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8: byte 0x{line[error.start]:02x} in column {error.start + 1}."]
    except json.JSONDecodeError as error:
        return None, [f"not JSON: {error.msg} in column {error.colno}."]
    return row, row_problems(row)


def row_problems(row: Any) -> list[str]:
    """Everything that is wrong with a row, one sentence each; empty for a good one."""
    if not isinstance(row, dict):
        return [f"{TYPE_NAMES[type(row)]}, but a row is an object with {' and '.join(REQUIRED)}."]
    problems = [_unknown_field(name) for name in row if name not in FIELDS]
    problems += [f"{name!r} is missing." for name in REQUIRED if name not in row]
    for name in (*REQUIRED, "demonstration", "kind"):
        if name in row:
            problems += _text_problems(repr(name), row[name])
    if "demonstrations" in row:
        problems += _list_problems(row["demonstrations"])
    if "demonstrations" in row and "demonstration" in row:
        problems.append("both 'demonstrations' and 'demonstration'; give one of them.")
    return problems


def make_example(row: dict[str, Any]) -> Example:
    """From a row without problems."""
    demonstrations = row.get("demonstrations", [])
    if "demonstration" in row:
        demonstrations = [row["demonstration"]]
    optional = {"kind": row["kind"]} if "kind" in row else {}
    return Example(row["prompt"], row["answer"], tuple(demonstrations), **optional)


def _read_lines(path: str) -> list[bytes]:
    try:
        content = epath.Path(path).read_bytes()
    except OSError as error:
        raise UsageError(
            f"The data file {path} cannot be read: {error.strerror or error}."
        ) from error
    if not content:
        raise UsageError(f"The data file {path} is empty.")
    # Bytes: text would also be split at U+2028, which may stand inside a JSON string.
    return content.splitlines()


def _unknown_field(name: str) -> str:
    close = difflib.get_close_matches(name, FIELDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(FIELDS)}."
    return f"unknown field {name!r}; {hint}"


def _text_problems(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} is {TYPE_NAMES[type(value)]}, but must be a string."]
    if not value.strip():
        return [f"{name} is empty."]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell "\ud83d", which no tokenizer takes
        return [f"{name} has half a surrogate pair as character {error.start + 1}."]
    return []


def _list_problems(value: Any) -> list[str]:
    if not isinstance(value, list):
        return [f"'demonstrations' is {TYPE_NAMES[type(value)]}, but must be a list of strings."]
    return [
        problem
        for number, text in enumerate(value, start=1)
        for problem in _text_problems(f"demonstration {number} of {len(value)}", text)
    ]
