"""Hugging Face's JSON files: read, written, and their values' types checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from srft_jax.config import UsageError


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a file; UsageError on anything else."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise UsageError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a JSON object, but {_shortened(content)}")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an object to a file, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def check_types(content: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    """Raise UsageError on a key whose value has another type; null has every type.

    Args:
        content: An object in a file.
        types: Key -> int, float | None, ...; an int is a float, a bool is neither.
        where: The file, and the object in it, as a message names them.
    """
    for key, kind in types.items():
        value = content.get(key)
        kinds = set(get_args(kind) or (kind,))
        kinds |= {int} if float in kinds else set()
        if value is not None and type(value) not in kinds:
            names = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise UsageError(
                f"{where} has {key} = {_shortened(value)}, which is not of type {names}"
            )


def _shortened(value: Any) -> str:
    return repr(value)[:60]
