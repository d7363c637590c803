"""Paths that a configuration names: on a local disk or on an object store, e.g. gs://bucket/run."""

import os

from etils import epath


def on_object_store(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on an object store.

    Files there cannot be appended to, and directories are only prefixes of names.
    """
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Return the path from the root, as Orbax wants it.

    epath's own `resolve` takes gs://bucket for a directory below the working directory.
    """
    whole = epath.Path(path)
    return whole if on_object_store(whole) else whole.resolve()
