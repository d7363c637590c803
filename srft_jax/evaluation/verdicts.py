"""Completions as text, and what the verifiers say of them."""

import dataclasses
from collections.abc import Sequence
from threading import Event
from typing import Any, Protocol

from srft_jax.data.examples import Example
from srft_jax.rewards import RewardPool, RewardRequest, RewardResult
from srft_jax.rollout import scheduler


class Decoder(scheduler.Decoder, Protocol):
    """What is used of a tokenizer."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def think_prefix(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Scored:
    """One verified completion."""

    example: Example
    text: str
    reward: float
    verdict: str

    def row(self, set_name: str) -> dict[str, Any]:
        """As a line of samples.jsonl."""
        return dict(
            set=set_name,
            prompt=self.example.prompt,
            completion=self.text,
            answer=self.example.answer,
            reward=self.reward,
            verdict=self.verdict,
        )


def verify(
    pool: RewardPool,
    examples: Sequence[Example],
    texts: Sequence[str],
    cancelled: Event | None = None,
) -> list[Scored]:
    """Verdicts on `texts[i]` as an answer to `examples[i]`; see RewardPool.score."""
    requests = [
        RewardRequest(example.kind, text, example.answer)
        for example, text in zip(examples, texts, strict=True)
    ]
    results: list[RewardResult] = pool.score(requests, cancelled)
    return [
        Scored(example, text, result.reward, result.verdict)
        for example, text, result in zip(examples, texts, results, strict=True)
    ]


def completion_text(tokenizer: Decoder, ids: Sequence[int]) -> str:
    """Text of a completion, without special tokens and with what the chat template began of it."""
    return tokenizer.think_prefix + tokenizer.decode(ids)
