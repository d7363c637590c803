"""Countdown: an expression that uses each number once and gives the target. Any right one counts:

    prompt          make 24 of 3, 4, 5, 8
    demonstration   <think>3+5=8, 8*4=32, 32-8=24</think>(3+5)*4-8
    size            numbers

The problem is made from its solution, which takes one number after the other. Every step gives a
whole number from 1 to 999.
"""

import functools

from srft_jax.data.procedural.problem import Problem, Space, digits

LEAST, MOST = 2, 25  # range of the numbers; 1 as a factor would be a step that does nothing
LIMIT = 999  # largest result of a step
SIGNS = 4


def spaces(size: int) -> list[Space]:
    count = (MOST - LEAST + 1) ** size * SIGNS ** (size - 1)
    return [Space(count, functools.partial(_problem, size))]


def _problem(size: int, index: int) -> Problem:
    choices, index = divmod(index, (MOST - LEAST + 1) ** size)
    first, *others = (LEAST + digit for digit in digits(index, MOST - LEAST + 1, size))
    value, expression, steps = first, str(first), list[str]()
    last = "*"  # sign of the last step; a lone number needs no brackets, as after a product
    for number, choice in zip(others, digits(choices, SIGNS, size - 1), strict=True):
        results = _results(value, number)
        sign = list(results)[choice % len(results)]
        if sign in "*/" and last in "+-":
            expression = f"({expression})"
        steps.append(f"{value}{sign}{number}={results[sign]}")
        value, expression, last = results[sign], f"{expression}{sign}{number}", sign
    prompt = f"make {value} of {', '.join(map(str, sorted([first, *others])))}"
    return Problem(prompt, expression, ", ".join(steps), content=prompt)


def _results(value: int, number: int) -> dict[str, int]:
    """Return allowed sign -> result; a sum or a difference is always allowed.

    In: 8, 4.  Out: {"+": 12, "-": 4, "*": 32, "/": 2}.
    """
    results = {}
    if value + number <= LIMIT:
        results["+"] = value + number
    if value > number:
        results["-"] = value - number
    if value * number <= LIMIT:
        results["*"] = value * number
    if value % number == 0:
        results["/"] = value // number
    return results
