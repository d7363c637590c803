"""Kinds of the procedural problems whose answers are more than a number; see data/procedural/.

Completions are hostile, so only +, -, * and / of whole numbers in a short string are evaluated,
without recursion. A text that is no expression or list at all is `unparsed`.
"""

import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

from srft_jax.rewards.extraction import answer_of
from srft_jax.rewards.judging import UNPARSED, Verifier, judged, option
from srft_jax.rewards.verdicts import RewardResult

T = TypeVar("T")

PROCEDURAL_OPTIONS = {"require_think": True}

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_OPERATIONS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_BINDING = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}


class Expression(NamedTuple):
    """An expression's value, and the numbers in it in ascending order."""

    value: Fraction
    numbers: list[int]


def countdown(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Accept any expression of gold's value that uses the same numbers, each equally often.

    In: "<think></think>8*3", gold "24", numbers [3, 8].  Out: right.

    The numbers are the row's column `numbers`. Without it they are those in gold, which then must
    be a solution and not just the target.
    """
    value, numbers = _read_gold(read_expression, gold)
    expected = Expression(value, _numbers(metadata) or numbers)
    return _verdict(completion, metadata, read_expression, expected)


def sorting(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare lists of whole numbers, in order; blanks, commas and brackets do not count.

    In: "<think></think>[7, 33,52]", gold "7 33 52".  Out: right.
    """
    return _verdict(completion, metadata, read_list, _read_gold(read_list, gold))


def number_base(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare numerals of any base up to 36; capitals and leading zeros do not count.

    In: "<think></think>01F", gold "1f".  Out: right.
    """
    return _verdict(completion, metadata, read_digits, _read_gold(read_digits, gold))


def _read_gold(read: Callable[[str], T | None], gold: str) -> T:
    value = read(gold.strip())
    if value is None:
        raise ValueError(f"gold {gold!r} is not what this kind compares")
    return value


def _verdict(
    completion: str, metadata: Mapping[str, Any], read: Callable[[str], T | None], expected: T
) -> RewardResult:
    answer = answer_of(completion, option(metadata, "require_think", PROCEDURAL_OPTIONS))
    value = read(answer.text) if answer is not None else None
    return UNPARSED if value is None else judged(value == expected)


def _numbers(metadata: Mapping[str, Any]) -> list[int]:
    numbers = metadata.get("numbers")
    if numbers is None:
        return []
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise TypeError(f"numbers = {numbers!r} is not a list of whole numbers")
    return sorted(numbers)


def read_list(text: str) -> list[int] | None:
    """Read a list of whole numbers.  In: "[7, -3 ,52]".  Out: [7, -3, 52]."""
    items = text.strip("[]() \t\n").replace(",", " ").split()
    if not items or not all(re.fullmatch(r"[+-]?[0-9]+", item) for item in items):
        return None
    return [int(item) for item in items]


def read_digits(text: str) -> str | None:
    """Read a numeral.  In: "01F".  Out: "1f"."""
    return text.lower().lstrip("0") if re.fullmatch(r"[0-9A-Za-z]+", text) else None


def read_expression(text: str) -> Expression | None:
    """Read an expression; None if the text is none or divides by zero.

    In: "-(1+2)*4".  Out: Expression(-12, [1, 2, 4]).
    """
    tokens = _TOKEN.findall(text)
    postfix = _to_postfix(tokens) if not _TOKEN.sub("", text).strip() else None
    value = _evaluate(postfix) if postfix is not None else None
    if value is None:
        return None
    return Expression(value, sorted(int(token) for token in tokens if token.isdigit()))


def _to_postfix(tokens: list[str]) -> list[str] | None:
    """Tokens in postfix order, by Dijkstra's shunting yard; None if they are no expression.

    In: - ( 1 + 2 ) * 4.  Out: 0 1 2 + 4 * -.  The stack is a list, so that depth costs nothing.
    """
    output: list[str] = []
    stack: list[str] = []
    wants_value = True
    for token in tokens:
        if wants_value and token.isdigit():
            output.append(token)
            wants_value = False
        elif wants_value and token == "(":
            stack.append(token)
        elif wants_value and token == "-" and (not stack or stack[-1] == "("):
            # A sign, which may stand first or first in brackets: 0 minus the rest.
            output.append("0")
            stack.append(token)
        elif not wants_value and token in _OPERATIONS:
            # All operations on the stack that bind at least as strongly come first.
            while stack and _BINDING[stack[-1]] >= _BINDING[token]:
                output.append(stack.pop())
            stack.append(token)
            wants_value = True
        elif not wants_value and token == ")" and "(" in stack:
            while (sign := stack.pop()) != "(":
                output.append(sign)
        else:
            return None
    return None if wants_value or "(" in stack else output + stack[::-1]


def _evaluate(postfix: list[str]) -> Fraction | None:
    """The value of an expression; None if it divides by zero."""
    values: list[Fraction] = []
    for token in postfix:
        if token not in _OPERATIONS:
            values.append(Fraction(int(token)))
            continue
        right = values.pop()
        if token == "/" and right == 0:
            return None
        values.append(_OPERATIONS[token](values.pop(), right))
    return values[0]


KINDS: Mapping[str, Verifier] = {
    "countdown": countdown,
    "sorting": sorting,
    "number_base": number_base,
}
