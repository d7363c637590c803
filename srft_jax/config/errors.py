"""What ends a run with a sentence instead of a traceback."""


class UsageError(ValueError):
    """The user asked for something that cannot be run. Only the text is shown; exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on. Only the text is shown; exit code 1."""
