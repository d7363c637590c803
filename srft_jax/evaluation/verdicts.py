"""Completions as text, and what the verifiers say of them."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from threading import Event
from typing import Any, Protocol

from srft_jax.config import ShapingConfig
from srft_jax.data.examples import Example, place
from srft_jax.rewards import RewardPool, RewardRequest
from srft_jax.rewards.requests import Verdict
from srft_jax.rewards.verifiers import columns_of, row_problem
from srft_jax.rollout import scheduler

PROBED_ROWS = 3  # of each kind and set, when a run starts


class Decoder(scheduler.Decoder, Protocol):
    """What is used of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def think_prefix(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class ShapingTerm:
    """What one term of rewards.shaping gives, before its weight."""

    kind: str
    weight: float
    reward: float
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Scored:
    """One verified completion.

    Attributes:
        example: What it answers.
        text: As the verifier read it.
        accuracy: What the example's own verifier gives; whether it is correct goes by this alone.
        verdict: Of that verifier.
        shaping: Further terms of the reward; none in evaluations.
    """

    example: Example
    text: str
    accuracy: float
    verdict: Verdict
    shaping: tuple[ShapingTerm, ...] = ()

    @property
    def reward(self) -> float:
        """What advantages are taken over."""
        return self.accuracy + sum(term.weight * term.reward for term in self.shaping)

    def row(self, set_name: str) -> dict[str, Any]:
        """As a line of samples.jsonl."""
        return dict(
            set=set_name,
            prompt=self.example.prompt,
            completion=self.text,
            answer=self.example.answer,
            kind=self.example.kind,
            reward=self.reward,
            accuracy=self.accuracy,
            verdict=self.verdict,
            shaping={term.kind: term.reward for term in self.shaping},
        )


def verify(
    pool: RewardPool,
    examples: Sequence[Example],
    texts: Sequence[str],
    num_tokens: Sequence[int],
    shaping: Sequence[ShapingConfig] = (),
    cancelled: Event | None = None,
) -> list[Scored]:
    """What verifiers say of `texts[i]`, of `num_tokens[i]` tokens, on `examples[i]`."""
    requests = [
        request
        for example, text, count in zip(examples, texts, num_tokens, strict=True)
        for request in _requests(example, text, count, shaping)
    ]
    answered = zip(requests, pool.score(requests, cancelled), strict=True)
    scored = []
    for example, text in zip(examples, texts, strict=True):
        own, *others = [result for _, result in itertools.islice(answered, 1 + len(shaping))]
        terms = [
            ShapingTerm(one.kind, one.weight, result.reward, result.verdict)
            for one, result in zip(shaping, others, strict=True)
        ]
        scored.append(Scored(example, text, own.reward, own.verdict, tuple(terms)))
    return scored


def probes(
    sets: Mapping[str, Sequence[Example]], shaping: Sequence[ShapingConfig]
) -> list[RewardRequest]:
    """What to try verifiers on: the first rows of each kind in each set, as if they were answered.

    The completion is the row's demonstration where it has one.
    """
    requests = []
    for name, examples in sets.items():
        seen: Counter[str] = Counter()
        for row, example in enumerate(examples, start=1):
            seen[example.kind] += 1
            if seen[example.kind] <= PROBED_ROWS:
                text, *_ = (*example.demonstrations, f"<think>\n</think>\n{example.answer}")
                placed = dataclasses.replace(example, where=place(example, name, row))
                requests += _requests(placed, text, len(text), shaping)
    return requests


def row_problems(
    sets: Mapping[str, Sequence[Example]],
    shaping: Sequence[ShapingConfig],
    options: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Rows that no completion could be verified on: a kind, gold answer or option that is none."""
    for name, examples in sets.items():
        for row, example in enumerate(examples, start=1):
            for request in _requests(example, "", 0, shaping if name == "train" else ()):
                kind = request.kind
                columns = columns_of(kind, request.metadata, options.get(kind, {}))
                if problem := row_problem(kind, request.gold, columns):
                    yield f"{place(example, name, row)}: {problem}"


def _requests(
    example: Example, text: str, num_tokens: int, shaping: Sequence[ShapingConfig]
) -> list[RewardRequest]:
    """One for the example's own verifier, then one for each term."""
    columns = {"prompt": example.prompt, **example.metadata, "num_tokens": num_tokens}
    asked = [(example.kind, columns), *((one.kind, columns | one.options) for one in shaping)]
    return [
        RewardRequest(kind, text, example.answer, metadata, example.where)
        for kind, metadata in asked
    ]


def completion_text(tokenizer: Decoder, ids: Sequence[int]) -> str:
    """Text of a completion, without special tokens and with what the chat template began of it."""
    return tokenizer.think_prefix + tokenizer.decode(ids)
