"""What one row of data is, whatever it was read from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

ChatRole = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """One message of a chat."""

    role: ChatRole
    content: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem.

    Args:
        prompt: Text of the user turn that is to be answered.
        answer: Gold answer that completions and demonstrations are verified against.
        demonstrations: Completions written by somebody else, thinking included; often none.
        kind: The verifier, a key of the table in rewards/, or `package.module:function`.
        history: Turns before the prompt: a system prompt, earlier questions and answers.
        metadata: All columns of the row, as JSON values: keyword arguments of a user's verifier,
            options of a built-in one. `choices` are the options in the order that they are shown.
        behavior_logprobs: Log-probs of each demonstration's tokens under whoever wrote it; empty
            where they are not known.
        source: Number of the row's training source, for mixtures.
        where: File and row, as messages name it.
    """

    prompt: str
    answer: str
    demonstrations: tuple[str, ...] = ()
    kind: str = "final_answer"
    history: tuple[Turn, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    behavior_logprobs: tuple[tuple[float, ...], ...] = ()
    source: int = 0
    where: str = ""


def row_name(example: Example, set_name: str, number: int) -> str:
    """Return what messages call a row: where it was read, or its number (from 1) in the set."""
    return example.where or f"{set_name}, row {number}"


class SourceRows(NamedTuple):
    """What became of the rows of a source.

    Attributes:
        source: Its key in the configuration.
        read: Rows that were looked at.
        used: Examples that were made from them.
    """

    source: str
    read: int
    used: int


@dataclasses.dataclass(frozen=True)
class ExampleSets:
    """The sets of a run; no prompt of `train` stands in another one.

    Args:
        train: Examples of all training sources, one source after the other.
        evaluation: Evaluation sets by name.
        rows: Counts for each source, in the order of the configuration.
    """

    train: tuple[Example, ...]
    evaluation: Mapping[str, tuple[Example, ...]]
    rows: tuple[SourceRows, ...] = ()
