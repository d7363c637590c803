"""Multiple-choice questions: lettered options under the question, a letter as gold answer."""

import random
import string
from collections.abc import Sequence
from typing import Any, NamedTuple


class Posed(NamedTuple):
    """A question with its options.

    Attributes:
        prompt: Question and lettered options.
        answer: Letter of the right option.
        choices: Options in the order of their letters, the first of which is A.
    """

    prompt: str
    answer: str
    choices: list[str]


def pose(question: str, options: Sequence[str], right: int, *, shuffle: bool) -> Posed:
    """Write the options under the question.

    In: 2+2?, [3, 4], 1.  Out: 2+2?\\n\\nA. 3\\nB. 4 with answer B.

    Args:
        question: Text without options.
        options: Texts in the order of the row.
        right: Index of the right option.
        shuffle: Put the options into an order that depends on question and options alone.
    """
    order = list(range(len(options)))
    if shuffle:
        random.Random("\n".join([question, *options])).shuffle(order)
    letters = string.ascii_uppercase[: len(options)]
    choices = [options[i].strip() for i in order]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, choices, strict=True)]
    return Posed("\n".join([question, "", *lines]), letters[order.index(right)], choices)


def right_option(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
    """Return the index of the option that a row calls right; None where it names none or several.

    Args:
        answer: A label, an index from 0, or the text of the option. A number is a label where the
            row has such a label: those of ARC may be 1, 2, 3, 4.
        options: Texts in the order of the row.
        labels: Labels of the options; by default letters.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in labels:
            return list(labels).index(str(answer))
        return answer if 0 <= answer < len(options) else None
    for names in (labels or string.ascii_uppercase[: len(options)], options):
        if list(names).count(answer) == 1:
            return list(names).index(answer)
    return None
