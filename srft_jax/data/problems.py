"""How mistakes in the user's data are told: all of them at once, before anything else happens."""

from collections.abc import Sequence

from srft_jax.config import UsageError

SHOWN = 10


def raise_problems(problems: Sequence[str]) -> None:
    """Nothing when there are none.

    Raises:
        UsageError: The first ten problems, one a line, then how many more there are.
    """
    if not problems:
        return
    lines = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more.")
    raise UsageError("\n".join(lines))
