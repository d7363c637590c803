"""What a field of a row may hold.

Each function takes a cell and a list of problems, which it extends by one sentence each. It returns
a value of the right type in any case, so that all problems of a row are told at once.
"""

import math
from typing import Any, NamedTuple, cast, get_args

from srft_jax.data.examples import ChatRole, Turn
from srft_jax.data.source_rows import type_name

Problems = list[str]


class Cell(NamedTuple):
    """What a column holds in one row, and what messages call it."""

    name: str
    value: Any


def text(cell: Cell, problems: Problems) -> str:
    """Return the cell's string, which must not be blank."""
    name, value = cell
    if not isinstance(value, str):
        problems.append(f"{name} is {type_name(value)}, but must be a string.")
    elif not value.strip():
        problems.append(f"{name} is empty.")
    elif (half := _half_surrogate(value)) is not None:
        problems.append(f"{name} has half a surrogate pair as character {half + 1}.")
    else:
        return value
    return ""


def answer(cell: Cell, problems: Problems) -> str:
    """Return a string, or a number as one.  In: 142.0.  Out: 142."""
    value = cell.value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return text(cell, problems)


def turns(cell: Cell, problems: Problems) -> list[Turn]:
    """Return messages as turns; a string is a user turn. Without problems there is at least one."""
    if not isinstance(cell.value, list):
        return [Turn("user", text(cell, problems))]
    if not cell.value:
        problems.append(f"{cell.name} is an empty list.")
    conversation = []
    for number, message in enumerate(cell.value, start=1):
        name = f"{cell.name}, message {number}"
        if not isinstance(message, dict):
            problems.append(f"{name} is {type_name(message)}, but must be an object.")
            continue
        role = message.get("role")
        if role not in get_args(ChatRole):
            roles = ", ".join(get_args(ChatRole))
            problems.append(f"{name} has the role {_short(role)}, which is none of {roles}.")
            continue
        content = text(Cell(f"{name}: 'content'", message.get("content")), problems)
        conversation.append(Turn(cast(ChatRole, role), content))
    return conversation


def texts(cell: Cell, problems: Problems) -> list[str]:
    """Return demonstrations: from a string, or a list of strings and of assistant messages."""
    if isinstance(cell.value, str):
        return [text(cell, problems)]
    if not isinstance(cell.value, list):
        what = type_name(cell.value)
        problems.append(f"{cell.name} is {what}, but must be a string or a list of them.")
        return []
    demonstrations = []
    for number, value in enumerate(cell.value, start=1):
        name = f"{cell.name}, number {number}"
        if isinstance(value, dict):
            role = value.get("role", "assistant")
            if role != "assistant":
                problems.append(f"{name} has the role {_short(role)}, but must be the assistant's.")
            name, value = f"{name}: 'content'", value.get("content")
        demonstrations.append(text(Cell(name, value), problems))
    return demonstrations


def options(cell: Cell, problems: Problems) -> list[str]:
    """Return the options: at least two strings, and at most as many as there are letters."""
    if not isinstance(cell.value, list):
        problems.append(f"{cell.name} is {type_name(cell.value)}, but must be a list of strings.")
        return []
    if not 2 <= len(cell.value) <= 26:
        problems.append(f"{cell.name} has {len(cell.value)} entries, but must have 2 to 26.")
    return [
        answer(Cell(f"{cell.name}, number {number}", value), problems)
        for number, value in enumerate(cell.value, start=1)
    ]


def logprobs(cell: Cell, demonstrations: int, problems: Problems) -> tuple[tuple[float, ...], ...]:
    """Return numbers for each demonstration; the list of a single one may stand alone."""
    lists = cell.value
    if (
        demonstrations == 1
        and isinstance(lists, list)
        and not any(isinstance(x, list) for x in lists)
    ):
        lists = [lists]
    if not isinstance(lists, list) or len(lists) != demonstrations:
        what = f"{len(lists)} lists" if isinstance(lists, list) else type_name(lists)
        problems.append(
            f"{cell.name} is {what}, but must be a list of numbers for each of the "
            f"{demonstrations} demonstrations."
        )
        return ()
    for number, values in enumerate(lists, start=1):
        if not isinstance(values, list) or not all(map(_is_logprob, values)):
            problems.append(
                f"{cell.name}, number {number}, is not a list of numbers that are at most 0."
            )
            return ()
    return tuple(tuple(map(float, values)) for values in lists)


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value <= 0


def _half_surrogate(value: str) -> int | None:
    """Return where a string cannot be UTF-8: JSON can spell "\\ud83d", which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 40 else type_name(value)
