"""Errors that end a run with a sentence instead of a traceback."""

import sys


class UsageError(ValueError):
    """The user asked for something that cannot be run. Only the text is shown; exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on. Only the text is shown; exit code 1."""


def show_error(error: UsageError | RunError) -> int:
    """Print the sentence and return the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
