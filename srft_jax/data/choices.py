"""Multiple-choice questions: options as lettered lines under the question, the gold a letter."""

import random
import string
from collections.abc import Sequence
from typing import Any, NamedTuple


class Posed(NamedTuple):
    """A question with its options.

    Attributes:
        prompt: Question and lettered options.
        answer: Letter of the right one.
        choices: Options, the first of which is A.
    """

    prompt: str
    answer: str
    choices: list[str]


def pose(question: str, options: Sequence[str], right: int, *, shuffle: bool) -> Posed:
    """In: 2+2?, [3, 4], 1.  Out: 2+2?\\n\\nA. 3\\nB. 4 with answer B.

    Args:
        question: Without options.
        options: In the order of the row.
        right: Index of the right one.
        shuffle: In an order that depends on the question and its options alone.
    """
    order = list(range(len(options)))
    if shuffle:
        random.Random("\n".join([question, *options])).shuffle(order)
    letters = string.ascii_uppercase[: len(options)]
    choices = [options[i].strip() for i in order]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, choices, strict=True)]
    return Posed("\n".join([question, "", *lines]), letters[order.index(right)], choices)


def right_option(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
    """Index of the option that a row calls right; None where it calls none or several so.

    Args:
        answer: A label, an index from 0, or the text of the option. A number is a label where the
            row has such a label: ARC's may be 1, 2, 3, 4.
        options: Of the row.
        labels: Of the options; by default letters.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in labels:
            return list(labels).index(str(answer))
        return answer if 0 <= answer < len(options) else None
    for names in (labels or string.ascii_uppercase[: len(options)], options):
        if list(names).count(answer) == 1:
            return list(names).index(answer)
    return None
