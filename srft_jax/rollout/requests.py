"""What goes into the sampler and what comes out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from srft_jax.config import ModelConfig, UsageError
from srft_jax.ops.attention import Kernel
from srft_jax.rollout.truncation import Truncation


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How requests are completed.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        truncation: Which tokens may be drawn at all.
        max_new_tokens: Longest completion, where the request does not say.
        slots: Most completions decoded side by side, by all devices together, rounded up.
        segment: Most decode steps between two looks at what has finished. Where completions wait
            for a slot, it ends as soon as an eighth of the slots is free.
        cache_mib: Memory of the KV cache on each device, which may allow fewer than `slots`; None
            takes what the device has left.
        dtype: Of activations and cache.
        attention: Kernel of attention over prompts.
        tensor: Devices that share one copy of the parameters while decoding; None takes the size
            of the mesh's axis `tensor`.
    """

    temperature: float = 1.0
    truncation: Truncation = Truncation()
    max_new_tokens: int = 128
    slots: int = 256
    segment: int = 64
    cache_mib: int | None = None
    dtype: str = "float32"
    attention: Kernel = "xla"
    tensor: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nor a NaN
            raise UsageError(f"temperature {self.temperature} is not 0 or more")
        for name in ("max_new_tokens", "slots", "segment"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} is below 1")


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

    prompt: Sequence[int] | np.ndarray
    group_size: int = 1
    forced: Sequence[int] = ()
    max_new_tokens: int | None = None
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()


def limit_of(request: Request, config: SamplingConfig) -> int:
    return config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


def check_request(
    name: str, request: Request, model_config: ModelConfig, config: SamplingConfig
) -> None:
    """Raises UsageError, beginning with `name`, on what cannot be completed."""
    if isinstance(request.prompt, str) or isinstance(request.stop_strings, str):
        raise UsageError(
            f"{name} has a text where a sequence belongs: prompt takes token ids, stop_strings a "
            "list of texts"
        )
    if not len(request.prompt):
        raise UsageError(f"{name} has an empty prompt")
    if request.group_size < 0:
        raise UsageError(f"{name} asks for {request.group_size} completions")
    if "" in request.stop_strings:
        raise UsageError(f"{name} has an empty stop string, which ends every text")
    ids = (*request.prompt, *request.forced)
    if min(ids) < 0 or max(ids) >= model_config.vocab_size:
        raise UsageError(
            f"{name} has token ids from {min(ids)} to {max(ids)}, but the vocabulary has "
            f"{model_config.vocab_size}"
        )
    limit = limit_of(request, config)
    if limit < max(1, len(request.forced)):
        raise UsageError(
            f"{name} may make {limit} tokens but has {len(request.forced)} forced ones"
        )
    if len(request.prompt) + limit > model_config.max_positions:
        raise UsageError(
            f"{name} has a prompt of {len(request.prompt)} tokens and may make {limit} more, but "
            f"the model has {model_config.max_positions} positions"
        )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion, EOS included.

    Attributes:
        tokens: Ids, int32 [n]; the first `num_forced` are the request's.
        logprobs: Of those tokens under the whole tempered policy, which is what the trainer
            computes, float32 [n].
        entropies: Of the whole tempered policy at each token, float32 [n].
        drawn_logprobs: Of those tokens under the truncated and renormalised distribution they were
            drawn from, float32 [n]; equal to `logprobs` without truncation and on forced tokens.
        finished: It ended by a stop id or string.
        num_forced: How many tokens were given, not sampled.
        request: Index of its request.
        member: Its number within the group.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    drawn_logprobs: np.ndarray
    finished: bool
    num_forced: int = 0
    request: int = 0
    member: int = 0

    @property
    def truncated(self) -> bool:
        """It was cut at its limit."""
        return not self.finished


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a rollout is. Seconds are wall time of the calling thread.

    Attributes:
        finished: Completions that have ended.
        total: Completions asked for.
        tokens: Drawn so far.
        steps: Decode steps so far.
        occupancy: Share of slots that drew a token, mean over the steps at which completions were
            waiting for a slot; 1 where none ever was.
        prefill_seconds: Running prompts.
        decode_seconds: Running decode steps, what the caller did meanwhile included.
        host_seconds: The rest: choosing what comes next, taking completions apart.
    """

    finished: int
    total: int
    tokens: int
    steps: int
    occupancy: float
    prefill_seconds: float
    decode_seconds: float
    host_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds + self.host_seconds
