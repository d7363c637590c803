"""Finds a completion's answer: after the reasoning, in a box or on a line of its own.

The text is hostile: this is string work in time linear in its length, and nothing is evaluated.
"""

import re
from typing import NamedTuple

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
MAX_TAIL = 4096  # the last characters after the reasoning, which alone are read
MAX_ANSWER = 512  # characters of the answer itself

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(
    r".*(?:####|\b(?:answer|solution)(?:\*\*|__)?\s*(?::|=|\bis\b:?)(?:\*\*|__)?)(.*)",
    re.IGNORECASE,
)
_NEXT_SENTENCE = re.compile(r"\.\s+(?=[A-Z])")


class Answer(NamedTuple):
    """An answer's text."""

    text: str
    marked: bool  # whether it stood in a box or on an answer line, not just at the end


def after_reasoning(completion: str, require_think: bool) -> str | None:
    """Return the text after the reasoning without blanks around it, however long.

    None unless the completion opens a think tag and then closes it, once each. If tags are not
    required, a text without any is all answer, and the template may have opened the tag.
    """
    opened, closed = completion.count(OPEN_TAG), completion.count(CLOSE_TAG)
    if not closed and not opened and not require_think:
        return completion.strip()
    reasoning, _, tail = completion.partition(CLOSE_TAG)
    if closed != 1 or opened > 1 or opened != reasoning.count(OPEN_TAG):
        return None
    return None if require_think and not opened else tail.strip()


class Box(NamedTuple):
    """The content of \\boxed{...}, and where in the text the box begins and ends."""

    text: str
    start: int
    end: int


def answer_of(completion: str, require_think: bool) -> Answer | None:
    """Return the answer that `find_answer` finds behind the reasoning, or None."""
    tail = after_reasoning(completion, require_think)
    return find_answer(tail) if tail is not None else None


def find_answer(tail: str) -> Answer | None:
    """Find the last box; else the last answer line; else take the last MAX_ANSWER characters.

    In: "The sum is 7.\\nAnswer: **7**."  Out: Answer("7", True).
    None if nothing is left, or if a box or answer line holds more than MAX_ANSWER characters.
    """
    tail = tail[-MAX_TAIL:]
    boxes = find_boxes(tail)
    text = boxes[-1].text if boxes else _answer_line(tail)
    if text is None:
        return Answer(plain(tail[-MAX_ANSWER:]), False) if tail.strip() else None
    answer = plain(text)
    return Answer(answer, True) if 0 < len(answer) <= MAX_ANSWER else None


def find_boxes(text: str) -> list[Box]:
    """Find every \\boxed{...} whose braces balance, in the order in which they close.

    In: "\\boxed{\\frac{1}{2}} and \\boxed{3".  Out: [Box("\\frac{1}{2}", 0, 18)].
    """
    open_braces: list[re.Match[str]] = []
    boxes = []
    for token in _BRACES.finditer(text):
        if token[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened[0] != "{":  # the brace of \boxed or \fbox
                content = text[opened.end() : token.start()]
                boxes.append(Box(content, opened.start(), token.end()))
        elif token[0].endswith("{") and token[0] != "\\{":  # an escaped brace opens nothing
            open_braces.append(token)
    return boxes


def _answer_line(text: str) -> str | None:
    """The text behind the last `Answer:`, `The answer is` or `####`, or the line below it.

    If several sentences follow on the line, only the first.
    """
    below = ""
    for line in reversed(text.splitlines()):
        if match := _ANSWER_LINE.match(line):
            return _NEXT_SENTENCE.split(match[1])[0] if plain(match[1]) else below
        below = line if plain(line) else below
    return None


def plain(text: str) -> str:
    """Strip blanks, emphasis, dollar signs and a full stop around a text.

    In: " **$\\frac12$**."  Out: "\\frac12".
    """
    text = text.strip().strip("*_ \t")
    text = text[:-1] if text.endswith(".") else text
    text = text.strip("*_ \t")
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(text) > 2 * len(left) and text.startswith(left) and text.endswith(right):
            return text[len(left) : -len(right)].strip()
    return text
