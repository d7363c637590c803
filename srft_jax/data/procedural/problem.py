"""What a problem family gives: spaces of numbered problems, each with its answer worked out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One problem.

    Args:
        prompt: The problem as text.
        answer: Its answer, with which a demonstration ends.
        working: The steps that lead to it; what a demonstration thinks.
        content: Text whose hash decides whether the problem is held out; the same for problems that
            differ in their order only, such as 12+34 and 34+12.
    """

    prompt: str
    answer: str
    working: str
    content: str


@dataclasses.dataclass(frozen=True)
class Space:
    """Problems of one size and form, numbered from 0 to count - 1.

    Args:
        count: How many numbers there are; it may be huge.
        problem: Function from a number to its problem. Two numbers may give the same problem, some
            give none.
    """

    count: int
    problem: Callable[[int], Problem | None]


@dataclasses.dataclass(frozen=True)
class ProblemFamily:
    """Problems of one kind, of all sizes.

    Args:
        kind: Verifier of completions.
        spaces: Function from a size to its problems; each family counts sizes in its own unit:
            terms, digits, numbers.
        smallest: Least size.
    """

    kind: str
    spaces: Callable[[int], Sequence[Space]]
    smallest: int = 2


def digits(index: int, base: int, count: int) -> list[int]:
    """Return the lowest `count` digits, lowest first.  In: 1203, 10, 3.  Out: [3, 0, 2]."""
    values = []
    for _ in range(count):
        index, digit = divmod(index, base)
        values.append(digit)
    return values
