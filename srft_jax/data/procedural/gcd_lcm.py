"""Greatest common divisors and least common multiples, by Euclid's steps:

    prompt          gcd(48,18)
    demonstration   <think>48=2*18+12, 18=1*12+6, 12=2*6+0</think>6
    prompt          lcm(48,18)
    demonstration   <think>48=2*18+12, 18=1*12+6, 12=2*6+0, 48/6=8, 8*18=144</think>144
    size            digits of the two numbers together, the first having as many or one more

Two numbers always have a divisor in common; otherwise `1` would be right three times out of five.
"""

import functools
import math

from srft_jax.data.procedural import products
from srft_jax.data.procedural.problem import Problem, Space


def spaces(size: int) -> list[Space]:
    (pairs,) = products.spaces(size)
    return [Space(pairs.count, functools.partial(_problem, name, size)) for name in ("gcd", "lcm")]


def _problem(name: str, size: int, index: int) -> Problem | None:
    a, b = products.pair(size, index)
    divisor = math.gcd(a, b)
    if divisor == 1:
        return None
    steps, answer = _euclid(a, b), divisor
    if name == "lcm":
        answer = a // divisor * b
        steps += [f"{a}/{divisor}={a // divisor}", f"{a // divisor}*{b}={answer}"]
    return Problem(
        prompt=f"{name}({a},{b})",
        answer=str(answer),
        working=", ".join(steps),
        content=f"{name}({min(a, b)},{max(a, b)})",
    )


def _euclid(a: int, b: int) -> list[str]:
    """Return Euclid's steps.  In: 18, 48.  Out: 48=2*18+12, 18=1*12+6, 12=2*6+0."""
    a, b = max(a, b), min(a, b)
    steps = []
    while b:
        steps.append(f"{a}={a // b}*{b}+{a % b}")
        a, b = b, a % b
    return steps
