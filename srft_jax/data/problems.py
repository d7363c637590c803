"""How mistakes in the user's data are told: all of them at once, before anything else happens."""

from collections.abc import Sequence

from srft_jax.config import UsageError

SHOWN = 10


def raise_problems(problems: Sequence[str], advice: str = "") -> None:
    """Nothing when there are none.

    Raises:
        UsageError: The first ten problems, one a line, how many more there are, and of
            several the advice.
    """
    if not problems:
        return
    lines = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more.")
    raise UsageError("\n".join([*lines, advice] if advice and len(problems) > 1 else lines))
