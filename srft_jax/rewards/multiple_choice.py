"""The kind `multiple_choice`: compares the option that a completion chose with gold."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from srft_jax.rewards.extraction import Answer, answer_of
from srft_jax.rewards.judging import UNPARSED, judged, option
from srft_jax.rewards.verdicts import RewardResult

CHOICE_OPTIONS = {"require_think": False}

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_UNLISTED = 10  # number of options if the question does not list them: A to J
_WRAPPED = re.compile(r"\\(?:text|textbf|mathbf|mathrm)\s*\{([^{}]*)\}")
_CAUSES = r"because|since|as|is"


class _Choices(NamedTuple):
    labels: Sequence[str]
    texts: Sequence[str]  # empty if the question does not list them


def multiple_choice(completion: str, gold: str, metadata: Mapping[str, Any]) -> RewardResult:
    """Compare the label of the chosen option with gold, which is a label or an option's text.

    The column `choices` holds the options: texts labelled A, B, ..., or {text: [...],
    label: [...]}. Without it, labels are A to J.

    In: "So it must be (B).", gold "B".  Out: right.

    Raises:
        ValueError: gold is none of the options, whatever the completion.
    """
    choices = _choices(metadata)
    expected = _label(Answer(gold.strip(), True), choices)
    if expected is None:
        raise ValueError(f"gold {gold[:80]!r} is none of the options {', '.join(choices.labels)}")
    answer = answer_of(completion, option(metadata, "require_think", CHOICE_OPTIONS))
    label = _label(answer, choices) if answer else None
    if label is None:
        return UNPARSED
    return judged(label == expected)


def _choices(metadata: Mapping[str, Any]) -> _Choices:
    listed = metadata.get("choices")
    if listed is None:
        return _Choices(_LETTERS[:_UNLISTED], ())
    if isinstance(listed, Mapping):
        return _Choices([str(x) for x in listed["label"]], [str(x) for x in listed["text"]])
    if not isinstance(listed, Sequence) or not 0 < len(listed) <= len(_LETTERS):
        raise ValueError(f"choices = {listed!r} is not a list of 1 to {len(_LETTERS)} options")
    return _Choices(_LETTERS[: len(listed)], [str(x) for x in listed])


def _label(answer: Answer, choices: _Choices) -> str | None:
    """The label that an answer names.

    In: "(b)", "B.", "B. Paris", "B because ...", "Paris", "... option B ...".  Out: "B".
    """
    text = " ".join(_WRAPPED.sub(r"\1", answer.text).split())
    any_label = "|".join(re.escape(label) for label in choices.labels)
    patterns = [
        rf"(?i:[(\[]?({any_label})[)\]]?[.:]?)$",  # a label alone
        rf"[(\[]?({any_label})(?:[)\]]|[).:,;](?=\s)|\s(?={_CAUSES}\b))",  # a label, then more
    ]
    for pattern in patterns:
        if match := re.match(pattern, text):
            return _known(match[1], choices)
    # An option's text. Without texts there are none to compare with.
    for label, choice in zip(choices.labels, choices.texts, strict=False):
        if text.casefold() == " ".join(choice.split()).casefold():
            return label
    # A label in prose, of which the last counts. One of the three groups has it, the others are "".
    named = r"\b(?i:option|choice|answer)"
    mentioned = re.findall(
        rf"\(({any_label})\)|{named}\s+\(?({any_label})\b"
        rf"|{named} is:? [*_]*({any_label})(?=[*_.,;]|$)",
        text,
    )
    return _known(max(mentioned[-1]), choices) if mentioned else None


def _known(label: str, choices: _Choices) -> str | None:
    """The label as the question spells it; None if a pattern takes a Turkish ı for an I."""
    folded = label.casefold()
    return next((known for known in choices.labels if known.casefold() == folded), None)
