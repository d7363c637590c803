"""Kinds that compare an answer with gold as text, number or pattern.

Completions are hostile: a policy will write whatever raises its reward or stops the run. So nothing
here evaluates text, and numbers are read by strict patterns from a short string only.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from srft_jax.rewards.extraction import (
    CLOSE_TAG,
    MAX_ANSWER,
    MAX_TAIL,
    after_reasoning,
    answer_of,
)
from srft_jax.rewards.judging import UNPARSED, judged, option
from srft_jax.rewards.quantities import Quantity, last_quantity, plain_number, quantity
from srft_jax.rewards.verdicts import RewardResult

NUMERIC_OPTIONS = {
    "require_think": False,
    "relative": 1e-6,
    "absolute": 0.0,
    "units": True,
}
REGEX_OPTIONS = {"require_think": False, "pattern": ""}


def final_answer(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare all that follows the reasoning with gold, as a string or as a number.

    In: "<think>\\n2 * 3 = 6, 6 + 1.5 = 7.5\\n</think>\\n15/2", gold "7.5".  Out: right.

    The verdict is `unparsed` unless the completion opens a think tag and then closes it, once each,
    and an answer of 1 to 512 characters follows (4,096 with the blanks around it).
    """
    answer = after_reasoning(completion, require_think=True)
    too_long = len(completion.rpartition(CLOSE_TAG)[2]) > MAX_TAIL
    if answer is None or too_long or not 0 < len(answer) <= MAX_ANSWER:
        return UNPARSED
    # As strings, or as plain numbers: "15/2" is "7.5".
    gold = gold.strip()
    value = plain_number(answer)
    return judged(answer == gold or (value is not None and value == plain_number(gold)))


def exact(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare the whole completion with gold; blanks around either do not count."""
    text = completion.strip()
    return judged(text == gold.strip()) if text else UNPARSED


def numeric(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare numbers: |answer - gold| <= max(absolute, relative * |gold|).

    Thousands separators, ratios, \\frac, powers of ten up to 10^400, percent and currency signs are
    read. A unit may follow if `units`; it counts only if gold has one too. A percent sign on one
    side alone is read as hundredths or as a unit, whichever fits.

    In: "The answer is 45\\%.", gold "0.45".  Out: right.

    Raises:
        ValueError: gold is no number, whatever the completion.
    """
    expected = quantity(gold)
    if expected is None:
        raise ValueError(f"gold {gold[:80]!r} is not a number")
    stated = answer_of(completion, option(metadata, "require_think", NUMERIC_OPTIONS))
    answer = None
    if stated is not None:
        answer = quantity(stated.text)
        if answer is None and not stated.marked:  # prose: its last number is the answer
            answer = last_quantity(stated.text)
    if answer is None or (answer.unit and not option(metadata, "units", NUMERIC_OPTIONS)):
        return UNPARSED
    if answer.unit and expected.unit and answer.unit != expected.unit:
        return judged(False)  # 3 cm is not 3 m
    return judged(any(_near(*pair, metadata) for pair in _readings(answer, expected)))


def regex(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Match the whole answer against `pattern`, or against gold if there is no pattern.

    In: "Answer: 7 apples", gold "7( apples)?".  Out: right.

    Raises:
        ValueError: the pattern is invalid, whatever the completion.
    """
    text = option(metadata, "pattern", REGEX_OPTIONS) or gold
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"{text[:80]!r} is not a pattern: {error}") from error
    answer = answer_of(completion, option(metadata, "require_think", REGEX_OPTIONS))
    return judged(pattern.fullmatch(answer.text) is not None) if answer else UNPARSED


def _readings(answer: Quantity, gold: Quantity) -> Sequence[tuple[Quantity, Quantity]]:
    """The pairs to compare.  In: 45%, 0.45.  Out: (45, 0.45) and (0.45, 0.45)."""
    if answer.percent == gold.percent:
        return [(answer, gold)]
    if answer.percent:
        return [(answer, gold), (answer._replace(value=answer.value / 100), gold)]
    return [(answer, gold), (answer, gold._replace(value=gold.value / 100))]


def _near(answer: Quantity, gold: Quantity, metadata: Mapping[str, Any]) -> bool:
    absolute = Fraction(option(metadata, "absolute", NUMERIC_OPTIONS))
    relative = Fraction(option(metadata, "relative", NUMERIC_OPTIONS))
    return abs(answer.value - gold.value) <= max(absolute, relative * abs(gold.value))
