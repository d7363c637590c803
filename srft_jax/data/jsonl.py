"""Rows of JSON: one object a line, or a list of objects."""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from etils import epath

from srft_jax.data.source_rows import Row

# Most levels of lists and objects: deeper rows stop Python's parser, at a depth that differs
# between its versions.
MAX_DEPTH = 100


def read_lines(path: epath.Path) -> Iterator[Row]:
    """Yield every line of a file."""
    with path.open("rb") as file:
        # Bytes: text would also be split at U+2028, which may stand inside a JSON string.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # an editor's mark that this is UTF-8
            yield _row(f"{path}, row {number}", line.rstrip(b"\r\n"))


def read_json_rows(path: epath.Path) -> Iterator[Row]:
    """Yield every element of a file that holds one list; any other file is read by lines."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from read_lines(path)
        return
    whole = _row(str(path), content)
    if whole.problem is not None:
        yield whole
        return
    for number, value in enumerate(whole.value, start=1):
        yield Row(f"{path}, row {number}", value)


def _row(where: str, text: bytes) -> Row:
    if not text.strip():
        return Row(where, problem="an empty line, but a row is an object.")
    try:
        value = _decoder().decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02x} in column {error.start + 1}"
        return Row(where, problem=f"not UTF-8: {byte}.")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return Row(where, problem=f"not JSON: {error.msg} in {line}column {error.colno}.")
    except _NamedTwice as error:
        return Row(where, problem=f"{str(error)!r} is there twice in one object.")
    except ValueError:  # Python reads no integer of more than 4,300 digits
        return Row(where, problem="a number has too many digits.")
    except RecursionError:
        return Row(where, problem=f"nested deeper than {MAX_DEPTH} levels.")
    if _deep(value):
        return Row(where, problem=f"nested deeper than {MAX_DEPTH} levels.")
    return Row(where, value)


@functools.cache  # json.loads with options would make one for every row
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(
        parse_float=_finite, parse_constant=_null, object_pairs_hook=_without_twins
    )


class _NamedTwice(ValueError):
    """The name that two values of an object have."""


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; two values of one name are an error, as readers would drop the first."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _NamedTwice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return value


def _finite(text: str) -> float | None:
    """Return the number; None where JSON cannot hold it, as in Arrow's rows.  In: 1e999."""
    value = float(text)
    return value if math.isfinite(value) else None


def _null(text: str) -> None:
    return None


def _deep(value: Any) -> bool:
    """Return whether a value has more than MAX_DEPTH levels of lists and objects."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
