"""What the sampler is asked, and how it samples."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from srft_jax.config import ModelConfig, Truncation, UsageError
from srft_jax.ops.attention import Kernel


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """What a sampler is made for: precision, memory, and what requests do not say themselves.

    Attributes:
        temperature: Divides the logits of requests that name no temperature; 0 is greedy.
        truncation: Which tokens may be drawn at all.
        max_new_tokens: Longest completion of requests that name no limit.
        slots: Most completions decoded side by side, by all devices together, rounded up.
        segment: Most decode steps between two looks at what has finished. Where completions wait
            for a slot, a segment ends as soon as an eighth of the slots is free.
        cache_mib: Memory of the KV cache on each device, which may allow fewer than `slots`; None
            takes what the device has left.
        dtype: Precision of activations and cache.
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
        _check_temperature(self.temperature)
        for name in ("max_new_tokens", "slots", "segment"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} is below 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, to be completed `group_size` times.

    Attributes:
        prompt: Token ids, at least one.
        group_size: Completions to be made.
        forced: Token ids that every completion starts with.
        max_new_tokens: Longest completion, forced tokens included; None takes the config's.
        stop_ids: Token ids that end a completion; the token is kept.
        stop_strings: Texts that end a completion; the sampler then needs a tokenizer. They are
            looked for in the text of drawn tokens, without forced ones and without special tokens.
        temperature: Divides the logits, 0 is greedy; None takes the config's.
        group: Number of the group that the completions belong to; None is the request's index.
            Completion m of group g draws from fold_in(fold_in(threefry, g), m); see
            `Sampler.submit`.
        first_member: Number of the first completion within the group. A group may come in several
            requests: seven plain completions, and an eighth that starts with forced tokens.
    """

    prompt: Sequence[int] | np.ndarray
    group_size: int = 1
    forced: Sequence[int] = ()
    max_new_tokens: int | None = None
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    temperature: float | None = None
    group: int | None = None
    first_member: int = 0


@dataclasses.dataclass(frozen=True)
class ResolvedRequest:
    """A `Request` with all filled in that it leaves to the sampler; see there for the fields."""

    prompt: Sequence[int] | np.ndarray
    group_size: int
    forced: Sequence[int]
    max_new_tokens: int
    stop_ids: Sequence[int]
    stop_strings: Sequence[str]
    temperature: float
    group: int
    first_member: int


def resolved(index: int, request: Request, config: SamplingConfig) -> ResolvedRequest:
    """Fill in what request number `index` leaves to the sampler."""
    limit, temperature, group = request.max_new_tokens, request.temperature, request.group
    filled = dict(
        max_new_tokens=config.max_new_tokens if limit is None else limit,
        temperature=config.temperature if temperature is None else temperature,
        group=index if group is None else group,
    )
    return ResolvedRequest(**(vars(request) | filled))


def validate_request(
    name: str,
    request: ResolvedRequest,
    model_config: ModelConfig,
    *,
    has_tokenizer: bool,
) -> None:
    """Validate a request; errors start with `name`.

    Raises:
        UsageError: an empty prompt, an id outside the vocabulary, a limit below the forced tokens,
            more tokens than the model has positions, a temperature below 0, an empty stop string,
            stop strings without a tokenizer.
    """
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
    if request.stop_strings and not has_tokenizer:
        raise UsageError(f"{name} has stop strings, which need a tokenizer")
    ids = (*request.prompt, *request.forced)
    if min(ids) < 0 or max(ids) >= model_config.vocab_size:
        raise UsageError(
            f"{name} has token ids from {min(ids)} to {max(ids)}, but the vocabulary has "
            f"{model_config.vocab_size}"
        )
    limit = request.max_new_tokens
    if limit < max(1, len(request.forced)):
        raise UsageError(
            f"{name} may make {limit} tokens but has {len(request.forced)} forced ones"
        )
    if len(request.prompt) + limit > model_config.max_positions:
        raise UsageError(
            f"{name} has a prompt of {len(request.prompt)} tokens and may make {limit} more, but "
            f"the model has {model_config.max_positions} positions"
        )
    _check_temperature(request.temperature, f"{name} has ")


def _check_temperature(temperature: float, prefix: str = "") -> None:
    if not temperature >= 0:  # a NaN is refused too
        raise UsageError(f"{prefix}temperature {temperature} is not 0 or more")
