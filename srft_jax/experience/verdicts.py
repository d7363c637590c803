"""Completions as text, and what the verifiers say of them."""

import dataclasses
import itertools
from collections.abc import Sequence
from threading import Event
from typing import Any, Protocol

from srft_jax.config import ShapingConfig
from srft_jax.data.examples import Example
from srft_jax.data.verifier_requests import verifier_requests
from srft_jax.rewards import RewardPool
from srft_jax.rewards.verdicts import Verdict
from srft_jax.rollout import scheduler


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
        for request in verifier_requests(example, text, count, shaping)
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


def completion_text(tokenizer: Decoder, ids: Sequence[int]) -> str:
    """Text of a completion, without special tokens and with what the chat template began of it."""
    return tokenizer.think_prefix + tokenizer.decode(ids)
