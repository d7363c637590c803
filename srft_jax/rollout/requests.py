"""What goes into the sampler and what comes out."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How requests are completed.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        max_new_tokens: Longest completion, where the request does not say.
        slots: Most completions decoded side by side.
        segment: Decode steps between two looks at what has finished; the cache grows by as many
            slots.
        dtype: Of activations and cache.
    """

    temperature: float = 1.0
    max_new_tokens: int = 128
    slots: int = 256
    segment: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0")
        for name in ("max_new_tokens", "slots", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is below 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, to be completed `group_size` times.

    Attributes:
        prompt: Token ids, at least one.
        group_size: Completions wanted.
        forced: Token ids that every completion starts with.
        max_new_tokens: Longest completion, forced tokens included; None takes the sampling
            config's.
        stop_ids: Token ids that end a completion; the token is kept.
        stop_strings: Texts that end a completion; needs a tokenizer.
    """

    prompt: Sequence[int]
    group_size: int = 1
    forced: Sequence[int] = ()
    max_new_tokens: int | None = None
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion, EOS included.

    Attributes:
        tokens: Ids, int32 [n]; the first `num_forced` are the request's.
        logprobs: Of those tokens under the tempered policy, float32 [n].
        entropies: Of the distribution each token was drawn from, float32 [n].
        finished: It ended by a stop id or string; otherwise it was cut at its limit.
        num_forced: How many tokens were given, not sampled.
        request: Index of its request.
        member: Its number within the group.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    finished: bool
    num_forced: int = 0
    request: int = 0
    member: int = 0
