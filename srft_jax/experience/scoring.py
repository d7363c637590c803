"""Answers as text, and what the verifiers say of them."""

import dataclasses
import itertools
from collections.abc import Sequence
from threading import Event
from typing import Any, Protocol

from srft_jax.batch import RewardTerm, Trajectory
from srft_jax.config import ShapingConfig
from srft_jax.data.examples import Example
from srft_jax.data.verifier_requests import verifier_requests
from srft_jax.rewards import RewardPool
from srft_jax.rollout import Detokenizer


class AnswerTokenizer(Detokenizer, Protocol):
    """The part of a tokenizer that turns answers into text."""

    @property
    def think_prefix(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How a run scores answers.

    Attributes:
        pool: Verifiers. A pool has one caller at a time.
        tokenizer: From ids to text.
        shaping: Terms of the reward beside a prompt's own verifier; in training only.
        threshold: A verifier's reward that reaches it counts as correct.
    """

    pool: RewardPool
    tokenizer: AnswerTokenizer
    shaping: Sequence[ShapingConfig] = ()
    threshold: float = 1.0

    def score(
        self,
        examples: Sequence[Example],
        trajectories: Sequence[Trajectory],
        cancelled: Event | None = None,
    ) -> list[Trajectory]:
        """Return each trajectory with its text and verdicts, as an answer to its example.

        Args:
            examples: As many as trajectories.
            trajectories: In any order.
            cancelled: Once it is set, what has no verdict yet is given up.
        """
        texts = [answer_text(self.tokenizer, one.tokens.tolist()) for one in trajectories]
        requests = [
            request
            for example, text, trajectory in zip(examples, texts, trajectories, strict=True)
            for request in verifier_requests(example, text, len(trajectory.tokens), self.shaping)
        ]
        results = zip(requests, self.pool.score(requests, cancelled), strict=True)
        scored = []
        for trajectory, text in zip(trajectories, texts, strict=True):
            # The prompt's own verifier comes first, then each shaping term.
            verifier, *terms = [
                result for _, result in itertools.islice(results, 1 + len(self.shaping))
            ]
            scored.append(
                dataclasses.replace(
                    trajectory,
                    text=text,
                    verifier_reward=verifier.reward,
                    correct=verifier.reward >= self.threshold,
                    verdict=verifier.verdict,
                    shaping=tuple(
                        RewardTerm(term.kind, term.weight, result.reward, result.verdict)
                        for term, result in zip(self.shaping, terms, strict=True)
                    ),
                )
            )
        return scored


def answer_text(tokenizer: AnswerTokenizer, ids: Sequence[int]) -> str:
    """Decode an answer without special tokens; put back the think tag that the template wrote."""
    return tokenizer.think_prefix + tokenizer.decode(ids)


def sample_row(set_name: str, example: Example, trajectory: Trajectory) -> dict[str, Any]:
    """Return a scored trajectory as a line of samples.jsonl."""
    return dict(
        set=set_name,
        prompt=example.prompt,
        completion=trajectory.text,
        answer=example.answer,
        kind=example.kind,
        reward=trajectory.reward,
        verifier_reward=trajectory.verifier_reward,
        verdict=trajectory.verdict,
        shaping={term.kind: term.reward for term in trajectory.shaping},
    )
