"""From text to token ids, once, before the first step.

What does not fit is an error here or is dropped and counted, so nothing is ever cut later.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float, Int

from srft_jax.batch import prompt_key
from srft_jax.data.examples import Example, ExampleSets, SourceRows, Turn, row_name
from srft_jax.data.problems import raise_problems

# Texts encoded at a time: work for all threads of a fast tokenizer, little enough for its memory.
_CHUNK = 256


class Encoder(Protocol):
    """The part of a tokenizer that encoding needs."""

    def encode_prompts(
        self, conversations: Sequence[Sequence[tuple[str, str]]], /
    ) -> list[list[int]]:
        """Encode turns (role, text) up to where the completion starts, chat template included."""

    def encode_completions(self, texts: Sequence[str], /) -> list[list[int]]:
        """Encode what the policy should generate after the prompt, the stop id included."""


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """One problem as text and as token ids.

    Attributes:
        example: The text.
        prompt: Ids of the prompt, chat template included.
        demonstrations: Ids of each demonstration, EOS included.
        behavior_logprobs: Log-probs of each demonstration's tokens under whoever wrote it; None
            where they are not known.
    """

    example: Example
    prompt: Int[np.ndarray, "n"]
    demonstrations: tuple[Int[np.ndarray, "n"], ...] = ()
    behavior_logprobs: tuple[Float[np.ndarray, "n"] | None, ...] = ()

    @property
    def key(self) -> str:
        """Identity of the prompt."""
        return prompt_key(self.prompt)


@dataclasses.dataclass(frozen=True)
class EncodedSets:
    """The sets of a run, as far as they fit the limits on lengths.

    Attributes:
        train: Training problems.
        evaluation: Evaluation sets by name.
        rows: What became of the rows of each source.
        dropped: What was too long, by set, `train` included.
    """

    train: tuple[EncodedExample, ...]
    evaluation: Mapping[str, tuple[EncodedExample, ...]]
    rows: tuple[SourceRows, ...]
    dropped: Mapping[str, "Dropped"]

    def named(self, name: str) -> tuple[EncodedExample, ...]:
        """Return the problems of a set."""
        return self.train if name == "train" else self.evaluation[name]

    @property
    def texts(self) -> dict[str, tuple[Example, ...]]:
        """All sets as text, `train` first."""
        sets = {"train": self.train, **self.evaluation}
        return {name: tuple(row.example for row in encoded) for name, encoded in sets.items()}


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Counts of what was too long in a set.

    Attributes:
        prompts: Rows that are gone.
        demonstrations: Demonstrations that rows which stay have lost.
        bare: Rows that stay and have lost their only demonstration.
    """

    prompts: int = 0
    demonstrations: int = 0
    bare: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Longest prompts and demonstrations, in tokens, EOS included.

    Attributes:
        max_prompt_tokens: Longest prompt of any set.
        max_demonstration_tokens: Longest demonstration; None where all lengths are fine.
        too_long: Whether longer ones are an error. `drop` takes a demonstration from its row, which
            then is a row without one, and takes a whole row whose prompt is too long.
    """

    max_prompt_tokens: int
    max_demonstration_tokens: int | None
    too_long: Literal["error", "drop"] = "error"

    def without_demonstrations(self) -> "Limits":
        """Return the same limits with demonstrations of any length."""
        return dataclasses.replace(self, max_demonstration_tokens=None)


def encode_sets(
    sets: ExampleSets,
    tokenizer: Encoder,
    limits: Limits,
    *,
    system_prompt: str | None = None,
) -> EncodedSets:
    """Encode all sets, and keep what fits the limits.

    Args:
        sets: All sets as text.
        tokenizer: See `Encoder`.
        limits: Longest prompts and demonstrations.
        system_prompt: First turn of every conversation that has no system turn of its own.

    Raises:
        UsageError: names the rows (from 1) that do not fit, with their tokens and the limit, or
            whose log-probs are not as many as their tokens; or nothing is left of a set.
    """
    kept: dict[str, tuple[EncodedExample, ...]] = {}
    dropped: dict[str, Dropped] = {}
    problems: list[str] = []
    longest_prompt = longest_demonstration = 0
    for name, examples in {"train": sets.train, **sets.evaluation}.items():
        # Demonstrations of evaluation sets are never trained on, so they may be of any length.
        limits_here = limits if name == "train" else limits.without_demonstrations()
        encoded = encode(examples, tokenizer, system_prompt=system_prompt)
        problems += _logprob_problems(name, encoded)
        longest_prompt = max([longest_prompt, *(len(ids.prompt) for ids in encoded)])
        if name == "train":
            sizes = [len(tokens) for ids in encoded for tokens in ids.demonstrations]
            longest_demonstration = max(sizes, default=0)
        if limits.too_long == "error":
            problems += _length_problems(name, encoded, limits_here)
        kept[name], dropped[name] = drop_too_long(encoded, limits_here)
        if examples and not kept[name]:
            problems.append(f"{name}: no prompt fits, so nothing is left of the set.")
    raise_problems(problems, _room(longest_prompt, longest_demonstration, limits))
    return EncodedSets(kept.pop("train"), kept, sets.rows, dropped)


def encode(
    examples: Sequence[Example], tokenizer: Encoder, *, system_prompt: str | None = None
) -> tuple[EncodedExample, ...]:
    """Encode prompts and demonstrations, in order; see `encode_sets`."""
    conversations = [conversation(example, system_prompt) for example in examples]
    texts = [text for example in examples for text in example.demonstrations]
    prompts = _in_chunks(tokenizer.encode_prompts, conversations)
    completions = _in_chunks(tokenizer.encode_completions, texts)
    return tuple(
        _encoded(example, prompt, tuple(next(completions) for _ in example.demonstrations))
        for example, prompt in zip(examples, prompts, strict=True)
    )


def conversation(example: Example, system_prompt: str | None = None) -> list[Turn]:
    """Return the turns up to the prompt, the system prompt first where there is none yet."""
    turns = [*example.history, Turn("user", example.prompt)]
    if system_prompt is None or turns[0].role == "system":
        return turns
    return [Turn("system", system_prompt), *turns]


def _in_chunks(
    encode: Callable[[Sequence[Any]], list[list[int]]], items: Sequence[Any]
) -> Iterator[Int[np.ndarray, "n"]]:
    """Yield `encode` of each item, in order. Four bytes a token: Python's numbers would take 36.

    A fast tokenizer has a thread for each core, so that other processes would only be in its way.
    """
    for start in range(0, len(items), _CHUNK):
        for ids in encode(items[start : start + _CHUNK]):
            yield np.asarray(ids, np.int32)


def _encoded(
    example: Example, prompt: np.ndarray, demonstrations: tuple[np.ndarray, ...]
) -> EncodedExample:
    # Without log-probs, an empty list stands for each demonstration.
    known = example.behavior_logprobs or ((),) * len(demonstrations)
    logprobs = tuple(
        _behavior_logprobs(values, len(tokens))
        for values, tokens in zip(known, demonstrations, strict=True)
    )
    return EncodedExample(example, prompt, demonstrations, logprobs)


def _behavior_logprobs(values: Sequence[float], num_tokens: int) -> np.ndarray | None:
    """Return one log-prob a token; where EOS has none, it gets 0 (p = 1).

    In: -1, -2 of three tokens.  Out: -1, -2, 0.
    """
    if not values:
        return None
    eos = [0.0] if len(values) == num_tokens - 1 else []
    return np.asarray([*values, *eos], np.float32)


def drop_too_long(
    encoded: Sequence[EncodedExample], limits: Limits
) -> tuple[tuple[EncodedExample, ...], Dropped]:
    """Return what fits, and the count of what does not."""
    kept: list[EncodedExample] = []
    prompts = demonstrations = bare = 0
    for problem in encoded:
        if len(problem.prompt) > limits.max_prompt_tokens:
            prompts += 1
            continue
        fitting = _fitting(problem, limits.max_demonstration_tokens)
        lost = len(problem.demonstrations) - len(fitting)
        demonstrations += lost
        bare += lost > 0 and not fitting
        kept.append(_with_only(problem, fitting) if lost else problem)
    return tuple(kept), Dropped(prompts, demonstrations, bare)


def _fitting(example: EncodedExample, max_tokens: int | None) -> list[int]:
    """Return the numbers of the demonstrations that fit, from 0."""
    return [
        number
        for number, tokens in enumerate(example.demonstrations)
        if max_tokens is None or len(tokens) <= max_tokens
    ]


def _with_only(encoded: EncodedExample, numbers: Sequence[int]) -> EncodedExample:
    """Return the problem with these of its demonstrations."""
    example, logprobs = encoded.example, encoded.example.behavior_logprobs
    text = dataclasses.replace(
        example,
        demonstrations=tuple(example.demonstrations[n] for n in numbers),
        behavior_logprobs=tuple(logprobs[n] for n in numbers) if logprobs else (),
    )
    return dataclasses.replace(
        encoded,
        example=text,
        demonstrations=tuple(encoded.demonstrations[n] for n in numbers),
        behavior_logprobs=tuple(encoded.behavior_logprobs[n] for n in numbers),
    )


def _room(prompt: int, demonstration: int, limits: Limits) -> str:
    """Return limits that would hold all rows; nothing where they fit.

    Args:
        prompt: Tokens of the longest prompt of all sets.
        demonstration: Tokens of the longest demonstration of the training set.
        limits: Limits of the training set.
    """
    longest_allowed = limits.max_demonstration_tokens
    assert longest_allowed is not None  # they are the training set's
    if prompt <= limits.max_prompt_tokens and demonstration <= longest_allowed:
        return ""
    return (
        f"The longest prompt has {prompt} tokens, the longest demonstration {demonstration}: "
        f"--data.max_prompt_tokens {max(prompt, limits.max_prompt_tokens)} "
        f"--data.max_demonstration_tokens {max(demonstration, longest_allowed)} and a "
        "training.row_length of their sum would hold all."
    )


def _length_problems(name: str, encoded: Sequence[EncodedExample], limits: Limits) -> Iterator[str]:
    fix = "raise it, or set data.too_long to drop"
    for row, ids in enumerate(encoded, start=1):
        where = row_name(ids.example, name, row)
        if len(ids.prompt) > limits.max_prompt_tokens:
            yield (
                f"{where}: the prompt has {len(ids.prompt)} tokens, "
                f"but data.max_prompt_tokens is {limits.max_prompt_tokens}; {fix}."
            )
        longest_allowed = limits.max_demonstration_tokens
        fitting = _fitting(ids, longest_allowed)
        for number, tokens in enumerate(ids.demonstrations):
            if number not in fitting:
                yield (
                    f"{where}: demonstration {number + 1} has {len(tokens)} tokens, "
                    f"but data.max_demonstration_tokens is {longest_allowed}; {fix}."
                )


def _logprob_problems(name: str, encoded: Sequence[EncodedExample]) -> Iterator[str]:
    for row, ids in enumerate(encoded, start=1):
        where = row_name(ids.example, name, row)
        pairs = zip(ids.demonstrations, ids.behavior_logprobs, strict=True)
        for number, (tokens, logprobs) in enumerate(pairs, start=1):
            if logprobs is not None and len(logprobs) != len(tokens):
                yield (
                    f"{where}: demonstration {number} has {len(logprobs)} behavior log-probs, but "
                    f"{len(tokens)} tokens with EOS; give one a token, that of EOS or not."
                )
