"""How mistakes in the user's data are told: all of them at once, before anything else happens."""

from collections.abc import Sequence

from srft_jax.config import UsageError

SHOWN = 10


def raise_problems(problems: Sequence[str], advice: str = "") -> None:
    """Raise all problems as one error; without problems nothing happens.

    Raises:
        UsageError: the first ten problems, one a line, how many more there are, and the advice
            where there are several.
    """
    if not problems:
        return
    lines = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more.")
    raise UsageError("\n".join([*lines, advice] if advice and len(problems) > 1 else lines))
