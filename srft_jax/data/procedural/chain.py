"""Chains of digits, worked from the left, keeping the last digit of every result:

    prompt          7+5*3-4
    demonstration   <think>2 6 2</think>2          7+5 = 12, 2*3 = 6, 6-4 = 2
    size            terms

One step is a small table to know; the whole chain at a glance is hard, so that thinking pays.
"""

import functools
import itertools
import operator

from srft_jax.data.procedural.problem import Problem, Space, digits

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
STEPS = [sign + str(digit) for sign in OPERATORS for digit in range(10)]


def spaces(size: int) -> list[Space]:
    return [Space(10 * len(STEPS) ** (size - 1), functools.partial(_problem, size))]


def results(prompt: str) -> list[int]:
    """Return the last digit after each operation.  In: 7+5*3-4.  Out: [2, 6, 2]."""
    values = itertools.accumulate(
        zip(prompt[1::2], map(int, prompt[2::2]), strict=True),
        lambda value, step: OPERATORS[step[0]](value, step[1]) % 10,
        initial=int(prompt[0]),
    )
    return list(values)[1:]


def _problem(size: int, index: int) -> Problem:
    steps, first = divmod(index, 10)
    prompt = str(first) + "".join(STEPS[step] for step in digits(steps, len(STEPS), size - 1))
    working = [str(value) for value in results(prompt)]
    return Problem(prompt, working[-1], " ".join(working), content=prompt)
