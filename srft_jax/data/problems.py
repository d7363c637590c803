"""How mistakes in the user's data are told: all of them at once, before anything else happens."""

from collections.abc import Sequence

from srft_jax.config import UsageError

SHOWN = 10  # problems told one by one; of more, only their number


def raise_problems(problems: Sequence[str], advice: str = "", *, shown: int = SHOWN) -> None:
    """Raise all problems as one error; without problems nothing happens.

    Args:
        problems: One sentence each.
        advice: A last line, where there are several problems.
        shown: Problems that are told one by one.

    Raises:
        UsageError: the first problems, one a line, how many more there are, and the advice.
    """
    if not problems:
        return
    lines = list(problems[:shown])
    if len(problems) > shown:
        lines.append(f"... and {len(problems) - shown} more.")
    raise UsageError("\n".join([*lines, advice] if advice and len(problems) > 1 else lines))
