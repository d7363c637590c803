"""Rows as they stand in files and on the hub, before anybody asks what they mean.

A row that cannot be read says why, and the rows after it are read all the same. Rows count from 1
in the file that they stand in; in a file of lines every line is a row, so that row numbers are the
line numbers of an editor.
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
        where: Its file and number.
        value: As JSON; anything but an object is a mistake.
        problem: Why it could not be read; None for one that could.
    """

    where: str
    value: Any = None
    problem: str | None = None


def type_name(value: Any) -> str:
    """In: [1].  Out: a list."""
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def find_files(key: str, pattern: str, endings: tuple[str, ...]) -> list[epath.Path]:
    """The files that a file, a folder or a glob names, sorted by their paths.

    Args:
        key: Of the configuration, for messages.
        pattern: File, folder (its files that end so, not those of folders in it) or glob.
        endings: That can be read.

    Raises:
        UsageError: There is no such file, or one that cannot be read.
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
    """In: data/*/a?.jsonl.  Out: what matches */a?.jsonl under data."""
    parts = path.parts
    fixed = next(i for i, part in enumerate(parts) if set(part) & set("*?["))
    root = epath.Path(*parts[:fixed]) if fixed else epath.Path(".")
    return iter(root.glob("/".join(parts[fixed:])))
