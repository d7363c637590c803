"""From text to token ids, once, before the first step.

What does not fit is an error here, so nothing is ever cut later.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from srft_jax.data.examples import Example, ExampleSets
from srft_jax.data.problems import raise_problems


class Encoder(Protocol):
    """What is used of a tokenizer."""

    def encode_prompt(self, text: str, /) -> list[int]:
        """The user turn, up to where the completion starts: chat template included."""

    def encode_completion(self, text: str, /) -> list[int]:
        """What the policy should generate after the prompt: the stop id included."""


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example."""

    prompt: list[int]
    demonstrations: tuple[list[int], ...]


@dataclasses.dataclass(frozen=True)
class EncodedSets:
    """Element by element those of `ExampleSets`."""

    train: tuple[EncodedExample, ...]
    evaluation: Mapping[str, tuple[EncodedExample, ...]]


def encode(examples: Sequence[Example], tokenizer: Encoder) -> tuple[EncodedExample, ...]:
    """Prompts and demonstrations, in order."""
    return tuple(
        EncodedExample(
            prompt=tokenizer.encode_prompt(example.prompt),
            demonstrations=tuple(map(tokenizer.encode_completion, example.demonstrations)),
        )
        for example in examples
    )


def encode_sets(
    sets: ExampleSets, tokenizer: Encoder, *, max_prompt_tokens: int, max_new_tokens: int
) -> EncodedSets:
    """All sets, checked by `check_lengths`."""
    encoded = EncodedSets(
        train=encode(sets.train, tokenizer),
        evaluation={
            name: encode(examples, tokenizer) for name, examples in sets.evaluation.items()
        },
    )
    check_lengths(encoded, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)
    return encoded


def check_lengths(sets: EncodedSets, *, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Every prompt fits, and every demonstration that is trained on: those of the training set.

    Raises:
        UsageError: Names set, row (from 1), its tokens and the limit of what does not fit.
    """
    problems: list[str] = []
    for name, examples in {"train": sets.train, **sets.evaluation}.items():
        for row, example in enumerate(examples, start=1):
            if len(example.prompt) > max_prompt_tokens:
                problems.append(
                    f"{name}, row {row}: the prompt has {len(example.prompt)} tokens, "
                    f"but data.max_prompt_tokens is {max_prompt_tokens}."
                )
    for row, number, tokens in _demonstrations(sets.train):
        if len(tokens) > max_new_tokens:
            problems.append(
                f"train, row {row}: demonstration {number} has {len(tokens)} tokens, "
                f"but rollout.max_new_tokens is {max_new_tokens}."
            )
    raise_problems(problems)


def _demonstrations(examples: Sequence[EncodedExample]) -> Iterator[tuple[int, int, list[int]]]:
    """Row, number within the row, and tokens; both counted from 1."""
    for row, example in enumerate(examples, start=1):
        for number, tokens in enumerate(example.demonstrations, start=1):
            yield row, number, tokens
