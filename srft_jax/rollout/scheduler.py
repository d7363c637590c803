"""Host side of the sampler: requests in, completions out.

Requests are cut into waves of at most `slots` completions. A wave decodes in segments; after each,
finished completions leave. Shapes are rounded up (width of prompts and of forced tokens to 16,
prompts and rows to 8), so that a run sees few of them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.config import ModelConfig
from srft_jax.models.decoder import Params, Runtime
from srft_jax.rollout.requests import Completion, Request, SamplingConfig
from srft_jax.rollout.sampler import DecodeState, Wave, decode, grow, prefill


class Decoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, tokens: Sequence[int]) -> str: ...


Member = tuple[int, int]  # (request, number within its group)


def sample(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    key: jax.Array,
    sampling_config: SamplingConfig,
    *,
    tokenizer: Decoder | None = None,
) -> list[list[Completion]]:
    """What `sample_stream` yields, in the order of requests and of group members."""
    groups: list[list[Completion | None]] = [[None] * request.group_size for request in requests]
    for completion in sample_stream(
        params, model_config, requests, key, sampling_config, tokenizer=tokenizer
    ):
        groups[completion.request][completion.member] = completion
    return groups  # type: ignore[return-value]


def sample_stream(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    key: jax.Array,
    sampling_config: SamplingConfig,
    *,
    tokenizer: Decoder | None = None,
) -> Iterator[Completion]:
    """Completions in the order in which they finish.

    Args:
        params: Of the policy.
        model_config: Architecture.
        requests: Prompts; request r's member g draws from fold_in(fold_in(key, r), g) whatever else
            is asked for.
        key: PRNG key.
        sampling_config: Temperature, lengths, shapes.
        tokenizer: Needed where a request has stop strings.

    Raises:
        ValueError: an empty prompt, a limit below the forced tokens, or stop strings without a
            tokenizer.
    """
    _check(requests, sampling_config, tokenizer)
    members = [
        (index, member)
        for index, request in enumerate(requests)
        for member in range(request.group_size)
    ]
    for start in range(0, len(members), sampling_config.slots):
        wave = members[start : start + sampling_config.slots]
        yield from _run_wave(params, model_config, requests, wave, key, sampling_config, tokenizer)


def _check(requests: Sequence[Request], config: SamplingConfig, tokenizer: Decoder | None) -> None:
    for index, request in enumerate(requests):
        limit = _limit(request, config)
        if not len(request.prompt):
            raise ValueError(f"request {index} has an empty prompt")
        if limit < max(1, len(request.forced)):
            raise ValueError(
                f"request {index} may make {limit} tokens but has {len(request.forced)} forced ones"
            )
        if request.stop_strings and tokenizer is None:
            raise ValueError(f"request {index} has stop strings, which need a tokenizer")


def _limit(request: Request, config: SamplingConfig) -> int:
    return config.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _padded(
    rows: Sequence[Sequence[int]], shape: tuple[int, int], fill: int, left: bool = False
) -> np.ndarray:
    """Rows of a matrix, filled up on the right or on the left."""
    out = np.full(shape, fill, np.int32)
    for number, row in enumerate(rows):
        columns = slice(shape[1] - len(row), None) if left else slice(len(row))
        out[number, columns] = row
    return out


def _make_wave(
    requests: Sequence[Request], wave: Sequence[Member], key: jax.Array, config: SamplingConfig
) -> Wave:
    of_row = [requests[index] for index, _ in wave]
    num_rows = _round_up(len(wave), 8)
    pairs = np.zeros((num_rows, 2), np.uint32)
    pairs[: len(wave)] = wave
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(
        jnp.asarray(pairs)
    )
    width = max(1, _round_up(max(len(request.forced) for request in of_row), 16))
    stops = max(1, *(len(request.stop_ids) for request in of_row))
    limits = [_limit(request, config) for request in of_row]
    return Wave(
        keys=keys,
        forced=jnp.asarray(_padded([request.forced for request in of_row], (num_rows, width), -1)),
        limit=jnp.asarray(limits + [1] * (num_rows - len(wave)), jnp.int32),
        stop_ids=jnp.asarray(
            _padded([request.stop_ids for request in of_row], (num_rows, stops), -1)
        ),
    )


def _prefill_wave(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    wave: Sequence[Member],
    config: SamplingConfig,
    max_new: int,
) -> DecodeState:
    distinct = sorted({index for index, _ in wave})
    prompts = [requests[index].prompt for index in distinct]
    number = {index: position for position, index in enumerate(distinct)}
    num_prompts, num_rows = _round_up(len(prompts), 8), _round_up(len(wave), 8)
    width = _round_up(max(len(prompt) for prompt in prompts), 16)
    lengths = [len(prompt) for prompt in prompts] + [1] * (num_prompts - len(prompts))
    prompt_of_row = np.zeros(num_rows, np.int32)
    prompt_of_row[: len(wave)] = [number[index] for index, _ in wave]
    return prefill(
        params,
        jnp.asarray(_padded(prompts, (num_prompts, width), 0, left=True)),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(prompt_of_row),
        jnp.arange(num_rows) < len(wave),
        config=model_config,
        runtime=Runtime(dtype=config.dtype),
        max_new=max_new,
        room=config.segment,
    )


def _run_wave(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    wave: Sequence[Member],
    key: jax.Array,
    config: SamplingConfig,
    tokenizer: Decoder | None,
) -> Iterator[Completion]:
    max_new = _round_up(max(_limit(requests[index], config) for index, _ in wave), config.segment)
    fixed = _make_wave(requests, wave, key, config)
    state = _prefill_wave(params, model_config, requests, wave, config, max_new)
    waiting = dict(enumerate(wave))
    while True:
        state = decode(
            params,
            fixed,
            state,
            config=model_config,
            runtime=Runtime(dtype=config.dtype),
            temperature=config.temperature,
            steps=config.segment,
        )
        cut = _stop_string_cuts(requests, waiting, state, tokenizer) if tokenizer else {}
        done = np.array(state.done)
        done[list(cut)] = True
        yield from _retire(requests, waiting, state, done, cut)
        if not waiting:
            return
        state = dataclasses.replace(
            state, cache=grow(state.cache, config.segment), done=jnp.asarray(done)
        )


def _retire(
    requests: Sequence[Request],
    waiting: dict[int, Member],
    state: DecodeState,
    done: np.ndarray,
    cut: dict[int, int],
) -> Iterator[Completion]:
    """Yields the completions of rows that are done, and takes the rows off `waiting`."""
    rows = [row for row in waiting if done[row]]
    if not rows:
        return
    tokens, logprobs, entropies = (
        np.asarray(x) for x in (state.tokens, state.logprobs, state.entropies)
    )
    lengths, stopped = np.asarray(state.lengths), np.asarray(state.stopped)
    for row in rows:
        index, member = waiting.pop(row)
        length = cut.get(row, lengths[row])
        yield Completion(
            tokens=tokens[row, :length].copy(),
            logprobs=logprobs[row, :length].copy(),
            entropies=entropies[row, :length].copy(),
            finished=bool(stopped[row]) or row in cut,
            num_forced=len(requests[index].forced),
            request=index,
            member=member,
        )


def _stop_string_cuts(
    requests: Sequence[Request], waiting: dict[int, Member], state: DecodeState, tokenizer: Decoder
) -> dict[int, int]:
    """Row -> how many tokens it keeps, where the sampled text contains a stop string of its."""
    rows = [row for row, (index, _) in waiting.items() if requests[index].stop_strings]
    if not rows:
        return {}
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    cuts = {}
    for row in rows:
        request = requests[waiting[row][0]]
        sampled = tokens[row, len(request.forced) : lengths[row]]
        for count in range(1, len(sampled) + 1):
            text = tokenizer.decode(sampled[:count].tolist())
            if any(stop in text for stop in request.stop_strings):
                cuts[row] = len(request.forced) + count
                break
    return cuts
