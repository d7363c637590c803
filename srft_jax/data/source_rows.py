"""Rows as they stand in files and on the hub, before anybody asks what they mean.

A row that cannot be read says why, and the rows after it are still read. Rows count from 1 in their
file; in a file of lines every line is a row, so that row numbers are an editor's line numbers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from etils import epath

from srft_jax.config import UsageError

TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row.

    Args:
        where: File and number of the row.
        value: JSON value; anything but an object is a mistake.
        problem: Why the row could not be read; None if it could.
    """

    where: str
    value: Any = None
    problem: str | None = None


def type_name(value: Any) -> str:
    """Return what messages call the type of a value.  In: [1].  Out: a list."""
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def find_files(key: str, pattern: str, endings: tuple[str, ...]) -> list[epath.Path]:
    """Return the files that a file, a folder or a glob names, sorted by their paths.

    Args:
        key: Key of the configuration, for messages.
        pattern: File, glob, or folder, of which only the files directly in it are taken.
        endings: Endings of files that can be read, such as .jsonl.

    Raises:
        UsageError: there is no such file, or one with another ending.
    """
    path = epath.Path(pattern)
    if "**" in pattern:
        raise UsageError(f"{key} = {pattern}: ** is not understood; name each level, as in */*.")
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in endings]
    elif set(pattern) & set("*?[") and not path.exists():
        files = list(_glob(path))
    elif path.exists():
        files = [path]
    else:
        raise UsageError(f"{key} = {pattern} cannot be read: No such file or directory.")
    if not files:
        raise UsageError(f"{key} = {pattern} holds no file that ends in {' or '.join(endings)}.")
    unread = [str(file) for file in files if file.suffix not in endings]
    if unread:
        raise UsageError(f"{key}: {unread[0]} ends in none of {', '.join(endings)}.")
    return sorted(files, key=str)


def _glob(path: epath.Path) -> Iterator[epath.Path]:
    """Yield what matches a glob.  In: data/*/a?.jsonl.  Out: what matches */a?.jsonl in data."""
    parts = path.parts
    fixed = next(i for i, part in enumerate(parts) if set(part) & set("*?["))
    root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
    return iter(root.glob("/".join(parts[fixed:])))
