"""Paths that a configuration names: on a local disk or on an object store, e.g. gs://bucket/run."""

import os

from etils import epath


def on_object_store(path: str | os.PathLike[str]) -> bool:
    """Where nothing is appended to, and directories are but the names of objects."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """The path from the root, as Orbax wants it.

    epath's own `resolve` takes gs://bucket for a directory below the working directory.
    """
    found = epath.Path(path)
    return found if on_object_store(found) else found.resolve()
