"""The kind `math`: are two answers the same mathematics? By Math-Verify, behind two quick looks.

Strings and plain numbers are compared here, within microseconds. What is left goes to Math-Verify,
which may take any time and memory: call it where you can afford that, such as in a worker of the
pool. Its own timeouts stay off, since they cancel the alarms of whoever calls it.
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
ROUNDING = 6  # decimals of a float that count, as Math-Verify has it

MATH_OPTIONS = {"require_think": True}
_MATH_MARKS = re.compile(r"\$|\\boxed|\\\(|\\\[")
# Only digits and what stands around them, or a word of three letters that is no command.
_PLAIN_TEXT = re.compile(r"^[-+\d.,\s%$€£¥²³]*$|(?<![\\A-Za-z])[A-Za-z]{3}")
# What joins boxes to one answer: $\boxed{1} \text{ and } x_2 = \boxed{2}$.
_TOGETHER = re.compile(
    r"(?:[\s$,;.]|\\[,;! ()\[\]]|\\q?quad|\\text\s*\{[^{}]*\}|and|or"
    r"|[A-Za-z]\w{0,2}(?:_\{?\w+\}?)?\s*=)*+"
)
# 10^{1000000000} and 1000000! take minutes to write down; an exponent may stand in braces.
_ENORMOUS = re.compile(r"(?:\^|\*\*)\s*[{(]*\s*[+-]?\s*[0-9]{7,}|[0-9]{6,}\s*[})]*\s*!")


def math(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compares the answer that follows the reasoning with gold.

    In: "<think>\\n...\\n</think>\\nIt is \\boxed{\\frac12}.", gold "0.5".  Out: right.

    `unparsed` without an answer, or without the think tags where `require_think` (the default).
    """
    tail = after_reasoning(completion, option(metadata, "require_think", MATH_OPTIONS))
    if tail is None:
        return UNPARSED
    return verify_math(tail, gold)


def verify_math(prediction: str, gold: str) -> RewardResult:
    """The same for a prediction without reasoning: prose that states an answer, or the answer.

    Args:
        prediction: Of it the last 4,096 characters are read.
        gold: LaTeX or plain, bare or in a sentence, boxed or not.
    """
    prediction = prediction[-MAX_TAIL:]
    found = find_answer(prediction)
    if found is None or _depth(found.text) > MAX_DEPTH:
        return UNPARSED
    boxes = find_boxes(prediction)
    together = len(boxes) > 1 and bool(
        _TOGETHER.fullmatch(prediction, boxes[-2].end, boxes[-1].start)
    )
    quick = None if together else _quick(found.text, _bare(gold))
    if quick is not None:
        return judged(quick)
    if _ENORMOUS.search(found.text) and not _ENORMOUS.search(gold):
        return judged(False)
    text = prediction[-MAX_ANSWER:] if together else _excerpt(prediction, found, len(boxes))
    parsed = _parse_prediction(text, found)
    return judged(_verify(_parse_gold(gold), parsed)) if parsed else UNPARSED


def load() -> None:
    """Imports Math-Verify and has it compile its patterns: a second or two."""
    for prediction in ("\\boxed{\\frac{1}{2} + x}", "(1, 2]", "x = 3"):
        verify_math(prediction, "$\\sqrt{2} x$")


def _bare(gold: str) -> str:
    boxes = find_boxes(gold)
    return plain(boxes[0].text if len(boxes) == 1 else gold)


def _quick(answer: str, gold: str) -> bool | None:
    """What needs no algebra: equal strings, and plain numbers that are equal or far apart."""
    if answer == gold:
        return True
    ours, theirs = plain_number(answer), plain_number(gold)
    if ours is None or theirs is None:
        return None
    if ours == theirs:
        return True
    return False if abs(ours - theirs) > 10**-ROUNDING else None


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


@functools.lru_cache(maxsize=256)
def _parse_gold(gold: str) -> Sequence[Any]:
    """As it stands and, where it marks no mathematics, as LaTeX too."""
    parsed = _parse(gold)
    return parsed if _MATH_MARKS.search(gold) else [*parsed, *_parse(_latex(gold))]


def _excerpt(prediction: str, found: Answer, num_boxes: int) -> str:
    """Up to MAX_ANSWER characters with the answer; the answer alone if it would not be found."""
    cut = len(prediction) > MAX_ANSWER and found.marked
    if num_boxes > 1 or (num_boxes and cut):
        return f"\\boxed{{{found.text}}}"
    return f"Answer: {found.text}" if cut else prediction[-MAX_ANSWER:]


def _parse_prediction(text: str, found: Answer) -> Sequence[Any]:
    """Math-Verify looks for the answer in the text itself.

    Of "2x + 1" it would take the 2: what marks no mathematics is told to be LaTeX, unless it looks
    like a number or like prose. (Letters without end are prose too, and take seconds as LaTeX.)
    """
    bare = _latex(found.text)
    if _MATH_MARKS.search(text) or _PLAIN_TEXT.search(found.text):
        return _parse(text) or (_parse(bare) if found.marked else ())
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
    """Imported late: sympy takes a second, and nobody else needs it."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its timeouts are off
    boxes_first = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return math_verify, (boxes_first, math_verify.ExprExtractionConfig())
