"""The kind `math`: tells whether two answers are the same mathematics, by Math-Verify.

Strings and plain numbers are compared here, within microseconds. All else goes to Math-Verify,
which may take any time and memory: call it where you can afford that, such as in a worker of the
pool. Its own timeouts stay off, since they cancel the alarms of the caller.
"""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from srft_jax.rewards.extraction import (
    MAX_ANSWER,
    MAX_TAIL,
    Answer,
    after_reasoning,
    find_answer,
    find_boxes,
    plain,
)
from srft_jax.rewards.judging import UNPARSED, judged, option
from srft_jax.rewards.quantities import plain_number
from srft_jax.rewards.verdicts import RewardResult

MAX_DEPTH = 24  # of brackets: the parser's time doubles with every few parentheses
ROUNDING = 6  # decimals of a float that count, as in Math-Verify

MATH_OPTIONS = {"require_think": True}
_MATH_MARKS = re.compile(r"\$|\\boxed|\\\(|\\\[")
# Only digits and the signs around them, or a word of three letters that is no command.
_PLAIN_TEXT = re.compile(r"^[-+\d.,\s%$€£¥²³]*$|(?<![\\A-Za-z])[A-Za-z]{3}")
# Text that joins boxes to one answer: $\boxed{1} \text{ and } x_2 = \boxed{2}$.
_TOGETHER = re.compile(
    r"(?:[\s$,;.]|\\[,;! ()\[\]]|\\q?quad|\\text\s*\{[^{}]*\}|and|or"
    r"|[A-Za-z]\w{0,2}(?:_\{?\w+\}?)?\s*=)*+"
)
# 10^{1000000000} and 1000000! take minutes to write down; an exponent may stand in braces.
_ENORMOUS = re.compile(r"(?:\^|\*\*)\s*[{(]*\s*[+-]?\s*[0-9]{7,}|[0-9]{6,}\s*[})]*\s*!")


def math(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare the answer that follows the reasoning with gold.

    In: "<think>\\n...\\n</think>\\nIt is \\boxed{\\frac12}.", gold "0.5".  Out: right.

    `unparsed` without an answer, or without the think tags where `require_think` (the default).
    """
    tail = after_reasoning(completion, option(metadata, "require_think", MATH_OPTIONS))
    if tail is None:
        return UNPARSED
    return verify_math(tail, gold)


def verify_math(prediction: str, gold: str) -> RewardResult:
    """Compare a prediction without reasoning with gold.

    Args:
        prediction: An answer, or prose that states one; its last 4,096 characters are read.
        gold: LaTeX or plain, bare or in a sentence, boxed or not.
    """
    prediction = prediction[-MAX_TAIL:]
    answer = find_answer(prediction)
    if answer is None or _depth(answer.text) > MAX_DEPTH:
        return UNPARSED
    # Several boxes may be one answer: \boxed{1} and \boxed{2}.
    boxes = find_boxes(prediction)
    together = len(boxes) > 1 and bool(
        _TOGETHER.fullmatch(prediction, boxes[-2].end, boxes[-1].start)
    )
    quick = None if together else _quick(answer.text, _bare(gold))
    if quick is not None:
        return judged(quick)
    # A huge power or factorial is not computed, unless gold has one too.
    if _ENORMOUS.search(answer.text) and not _ENORMOUS.search(gold):
        return judged(False)
    text = prediction[-MAX_ANSWER:] if together else _excerpt(prediction, answer, len(boxes))
    parsed = _parse_prediction(text, answer)
    return judged(_verify(_parse_gold(gold), parsed)) if parsed else UNPARSED


def load_math_verify() -> None:
    """Import Math-Verify and let it compile its patterns, which takes a second or two."""
    for prediction in ("\\boxed{\\frac{1}{2} + x}", "(1, 2]", "x = 3"):
        verify_math(prediction, "$\\sqrt{2} x$")


def _bare(gold: str) -> str:
    """Gold without its box and the signs around it."""
    boxes = find_boxes(gold)
    return plain(boxes[0].text if len(boxes) == 1 else gold)


def _quick(answer: str, gold: str) -> bool | None:
    """The verdict where it needs no algebra: equal strings, or plain numbers equal or far apart."""
    if answer == gold:
        return True
    value, gold_value = plain_number(answer), plain_number(gold)
    if value is None or gold_value is None:
        return None
    if value == gold_value:
        return True
    return False if abs(value - gold_value) > 10**-ROUNDING else None


def _depth(text: str) -> int:
    """How deep brackets are nested."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


@functools.lru_cache(maxsize=256)
def _parse_gold(gold: str) -> Sequence[Any]:
    """Gold parsed as it stands and, if it marks no mathematics, as LaTeX too."""
    parsed = _parse(gold)
    return parsed if _MATH_MARKS.search(gold) else [*parsed, *_parse(_latex(gold))]


def _excerpt(prediction: str, answer: Answer, num_boxes: int) -> str:
    """The part that Math-Verify reads: up to MAX_ANSWER characters that hold the answer.

    The answer alone, marked again, if Math-Verify would not find it there.
    """
    cut = len(prediction) > MAX_ANSWER and answer.marked
    if num_boxes > 1 or (num_boxes and cut):
        return f"\\boxed{{{answer.text}}}"
    return f"Answer: {answer.text}" if cut else prediction[-MAX_ANSWER:]


def _parse_prediction(text: str, answer: Answer) -> Sequence[Any]:
    """The text parsed by Math-Verify, which looks for the answer in it.

    In "2x + 1" it would take the 2: a text that marks no mathematics is marked as LaTeX, unless it
    looks like a number or like prose. (Endless letters are prose too, and take seconds as LaTeX.)
    """
    bare = _latex(answer.text)
    if _MATH_MARKS.search(text) or _PLAIN_TEXT.search(answer.text):
        return _parse(text) or (_parse(bare) if answer.marked else ())
    return _parse(bare) or _parse(text)


def _latex(text: str) -> str:
    return f"${text}$"


def _parse(text: str) -> Sequence[Any]:
    math_verify, targets = _library()
    parsed: Sequence[Any] = math_verify.parse(text, targets, parsing_timeout=None)
    return parsed


def _verify(gold: Sequence[Any], parsed: Sequence[Any]) -> bool:
    math_verify, _ = _library()
    same: bool = math_verify.verify(gold, parsed, float_rounding=ROUNDING, timeout_seconds=None)
    return same


@functools.cache
def _library() -> tuple[Any, Sequence[Any]]:
    """Math-Verify and its targets; imported late, since sympy takes a second to load."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its timeouts are off
    boxes_first = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return math_verify, (boxes_first, math_verify.ExprExtractionConfig())
