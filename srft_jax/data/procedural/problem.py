"""What a family of problems gives: spaces of numbered problems, each with its answer worked out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One problem.

    Args:
        prompt: The problem as text.
        answer: Its answer, with which a demonstration ends.
        working: The steps that lead there; what a demonstration thinks.
        content: Decides whether the problem is held out; the same for problems that differ in
            their order only, such as 12+34 and 34+12.
    """

    prompt: str
    answer: str
    working: str
    content: str


@dataclasses.dataclass(frozen=True)
class Space:
    """Problems of one size and form, numbered from 0 to count - 1.

    Args:
        count: Of the numbers; it may be huge.
        problem: The problem of a number. Two numbers may give the same one, some give none.
    """

    count: int
    problem: Callable[[int], Problem | None]


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of problem.

    Args:
        kind: The verifier of its completions.
        spaces: Problems of a size, which counts what the family says: terms, digits, numbers.
        smallest: Least size.
    """

    kind: str
    spaces: Callable[[int], Sequence[Space]]
    smallest: int = 2


def digits(index: int, base: int, count: int) -> list[int]:
    """The lowest `count` digits, lowest first. In: 1203, 10, 3.  Out: [3, 0, 2]."""
    values = []
    for _ in range(count):
        index, digit = divmod(index, base)
        values.append(digit)
    return values
