"""Products of two numbers, by long multiplication: a partial product for each digit, added up:

    prompt          123*45
    demonstration   <think>123*40=4920, 123*5=615, 4920+615=5535</think>5535
    size            digits of the two factors together, the first having as many or one more

With more digits the products so far are added up after each one.
"""

import functools

from srft_jax.data.procedural.problem import Problem, Space


def spaces(size: int) -> list[Space]:
    count = 9 * 10 ** (size - size // 2 - 1) * 9 * 10 ** (size // 2 - 1)
    return [Space(count, functools.partial(_problem, size))]


def pair(size: int, index: int) -> tuple[int, int]:
    """Return two numbers that have `size` digits together.  In: 5, 0.  Out: (100, 10)."""
    first, second = 10 ** (size - size // 2 - 1), 10 ** (size // 2 - 1)
    high, low = divmod(index, 9 * second)
    return first + high, second + low


def _problem(size: int, index: int) -> Problem:
    a, b = pair(size, index)
    return Problem(
        prompt=f"{a}*{b}",
        answer=str(a * b),
        working=", ".join(_steps(a, b)),
        content=f"{min(a, b)}*{max(a, b)}",
    )


def _steps(a: int, b: int) -> list[str]:
    """Return the partial products and their sums; a digit 0 has no step.

    In: 123, 405.  Out: 123*400=49200, 123*5=615, 49200+615=49815.
    """
    steps: list[str] = []
    total = 0
    for place, digit in zip(reversed(range(len(str(b)))), str(b), strict=True):
        if digit == "0":
            continue
        factor = int(digit) * 10**place
        steps.append(f"{a}*{factor}={a * factor}")
        if total:
            steps.append(f"{total}+{a * factor}={total + a * factor}")
        total += a * factor
    return steps
