"""Sorting numbers from 0 to 99, by inserting one after the other:

    prompt          sort 52 7 81 33
    demonstration   <think>7 52, 7 52 81, 7 33 52 81</think>7 33 52 81
    size            numbers

Numbers may come twice.
"""

import bisect
import functools

from srft_jax.data.procedural.problem import Problem, Space, digits

MOST = 99


def spaces(size: int) -> list[Space]:
    return [Space((MOST + 1) ** size, functools.partial(_problem, size))]


def _problem(size: int, index: int) -> Problem:
    numbers = digits(index, MOST + 1, size)
    ordered, steps = numbers[:1], list[str]()
    for number in numbers[1:]:
        bisect.insort(ordered, number)
        steps.append(_join(ordered))
    return Problem(
        prompt=f"sort {_join(numbers)}",
        answer=_join(ordered),
        working=", ".join(steps),
        content=_join(ordered),
    )


def _join(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))
