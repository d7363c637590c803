"""Sums of two-digit numbers, by running totals:

    prompt          35+40+17
    demonstration   <think>35+40=75, 75+17=92</think>92
    size            terms

Single digits would spell a chain, which has another answer.
"""

import functools
import itertools

from srft_jax.data.procedural.problem import Problem, Space, digits

LEAST, MOST = 10, 99


def spaces(size: int) -> list[Space]:
    return [Space((MOST - LEAST + 1) ** size, functools.partial(_problem, size))]


def _problem(size: int, index: int) -> Problem:
    terms = [LEAST + digit for digit in digits(index, MOST - LEAST + 1, size)]
    totals = list(itertools.accumulate(terms))
    steps = [
        f"{a}+{term}={b}"
        for (a, b), term in zip(itertools.pairwise(totals), terms[1:], strict=True)
    ]
    return Problem(
        prompt=_join(terms),
        answer=str(totals[-1]),
        working=", ".join(steps),
        content=_join(sorted(terms)),
    )


def _join(terms: list[int]) -> str:
    return "+".join(map(str, terms))
