"""Whole numbers in another base, by repeated division; the remainders, read backwards, are it:

    prompt          213 in base 7
    demonstration   <think>213=30*7+3, 30=4*7+2, 4=0*7+4</think>423
    size            digits of the answer

Bases are 2 to 16 without 10; digits above 9 are the letters a to f.
"""

import functools

from srft_jax.data.procedural.problem import Problem, Space

BASES = [base for base in range(2, 17) if base != 10]
DIGITS = "0123456789abcdef"


def spaces(size: int) -> list[Space]:
    """Return one space for each base: in a common space most problems would be of base 16."""
    return [
        Space((base - 1) * base ** (size - 1), functools.partial(_problem, base, size))
        for base in BASES
    ]


def _problem(base: int, size: int, index: int) -> Problem:
    value = base ** (size - 1) + index
    prompt = f"{value} in base {base}"
    steps, answer = [], ""
    while value:
        quotient, remainder = divmod(value, base)
        steps.append(f"{value}={quotient}*{base}+{remainder}")
        value, answer = quotient, DIGITS[remainder] + answer
    return Problem(prompt, answer, ", ".join(steps), content=prompt)
