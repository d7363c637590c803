"""Host side of the sampler: requests in, completions out, by continuous batching.

    waiting completions take free rows -> new prompts are prefilled -> a segment of decode steps
        -> what has finished is handed out, while the next segment runs

Shapes are static: rows, prompts and lanes of a call are planned once, capacities are one of few.
Several processes each bring requests of their own and decode in lock step; one that does not
consume its stream keeps the others waiting.
"""

import bisect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from srft_jax.config import ModelConfig, UsageError
from srft_jax.mesh import decode_mesh, largest_of_processes
from srft_jax.models.decoder import Params
from srft_jax.rollout.engine import Engine
from srft_jax.rollout.params import decode_params
from srft_jax.rollout.plan import make_plan
from srft_jax.rollout.requests import (
    Completion,
    Progress,
    Request,
    SamplingConfig,
    check_request,
)
from srft_jax.rollout.sampler import Drawn
from srft_jax.rollout.slots import Row, Slots, distinct_prompts

# A segment ends early when this share of the rows has finished and others wait for a row.
_SHARE_FINISHED = 1 / 8


class Decoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, tokens: Sequence[int]) -> str: ...


Observer = Callable[[Progress], None]


def sample(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    key: jax.Array,
    sampling_config: SamplingConfig,
    *,
    tokenizer: Decoder | None = None,
    observer: Observer | None = None,
) -> list[list[Completion]]:
    """What `sample_stream` yields, in the order of requests and of group members."""
    groups: list[list[Completion | None]] = [[None] * request.group_size for request in requests]
    for completion in sample_stream(
        params,
        model_config,
        requests,
        key,
        sampling_config,
        tokenizer=tokenizer,
        observer=observer,
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
    observer: Observer | None = None,
) -> Iterator[Completion]:
    """Completions in the order in which they finish, on the mesh in context at this call.

    What the caller does with them goes on beside the next segment of decode steps.

    Args:
        params: Of the policy; the mesh in context says how they lie on devices.
        model_config: Architecture.
        requests: Prompts; member g of request number r draws from fold_in(fold_in(key, r), g)
            whatever else is asked for. Several processes each bring their own, and keys or numbers
            of their own.
        key: PRNG key.
        sampling_config: Temperature, lengths, memory.
        tokenizer: Needed where a request has stop strings.
        observer: Called after every segment.

    Raises:
        UsageError: an empty prompt, an id outside the vocabulary, a limit below the forced tokens,
            more tokens than the model has positions, an empty stop string, stop strings without a
            tokenizer; while iterating, no memory for a single row.
    """
    for index, request in enumerate(requests):
        check_request(f"request {index}", request, model_config, sampling_config)
        if request.stop_strings and tokenizer is None:
            raise UsageError(f"request {index} has stop strings, which need a tokenizer")
    mesh = _mesh(sampling_config)
    return _stream(params, model_config, requests, key, sampling_config, mesh, tokenizer, observer)


def _stream(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    key: jax.Array,
    sampling_config: SamplingConfig,
    mesh: Mesh | None,
    tokenizer: Decoder | None,
    observer: Observer | None,
) -> Iterator[Completion]:
    prompts = distinct_prompts(requests, sampling_config)
    if largest_of_processes(len(prompts)) == (0,):
        return
    account = _Account(total=sum(request.group_size for request in requests))
    # Made first: what they take is not left for the cache.
    to_decode = decode_params(params, model_config, sampling_config.dtype, mesh)
    to_prefill = to_decode | {"layers": params["layers"]}
    plan = make_plan(model_config, prompts, sampling_config, mesh)
    slots = Slots(
        prompts,
        shards=plan.local_shards,
        rows=plan.rows,
        prompt_slots=plan.prompts,
        lanes=plan.lanes,
    )
    with_forced = largest_of_processes(any(len(request.forced) for request in requests))[0] > 0
    engine = Engine(
        to_prefill, to_decode, model_config, sampling_config, plan, key, mesh, with_forced
    )
    enough = max(1, int(_SHARE_FINISHED * plan.rows * plan.shards))
    finished: list[Completion] = []
    while True:
        placements = slots.admit()
        began = time.monotonic()
        engine.prefill(slots, placements)
        account.prefill_seconds += time.monotonic() - began

        busy, waiting = largest_of_processes(bool(slots.running), slots.waiting)
        began = time.monotonic()
        running = (
            engine.start(slots, enough if waiting else plan.rows * plan.shards) if busy else None
        )
        yield from finished
        if running is None:
            return
        drawn = engine.finish(running)
        account.decode_seconds += time.monotonic() - began

        account.note_segment(drawn, slots)
        finished = _finish(requests, slots, drawn, tokenizer)
        account.finished += len(finished)
        if observer is not None:
            observer(account.progress())


def _mesh(config: SamplingConfig) -> Mesh | None:
    """The mesh in context, as it is laid out for decoding."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    return decode_mesh(mesh, config.tensor)


def _finish(
    requests: Sequence[Request], slots: Slots, drawn: Drawn, tokenizer: Decoder | None
) -> list[Completion]:
    """Notes what rows have drawn; takes out those that have ended."""
    tokens, counts = np.asarray(drawn.tokens), np.asarray(drawn.counts)
    floats = np.stack([drawn.logprobs, drawn.entropies, drawn.drawn_logprobs])  # [3, R, U]
    finished = []
    for number, row in list(slots.numbered()):
        count = int(counts[number])
        row.chunks.append((tokens[number, :count], floats[:, number, :count]))
        row.count += count
        request = requests[row.job.request]
        stopped = bool(drawn.stopped[number])
        cut = _stop_string_cut(request, row, count, tokenizer) if tokenizer else None
        if stopped or cut is not None or row.count >= row.job.limit:
            slots.retire(number)
            finished.append(_completion(row, stopped or cut is not None, cut))
    return finished


def _completion(row: Row, finished: bool, cut: int | None) -> Completion:
    """Of a row that has ended; `cut` is how many drawn tokens a stop string leaves."""
    prompt, parts = row.prompt, row.chunks
    drawn = np.concatenate([tokens for tokens, _ in parts])[:cut]
    of_drawn = np.concatenate([floats for _, floats in parts], axis=1)[:, :cut]
    forced = np.asarray(prompt.forced, np.int32)
    logprobs, entropies, drawn_logprobs = np.concatenate([prompt.forced_floats, of_drawn], axis=1)
    return Completion(
        tokens=np.concatenate([forced, drawn]),
        logprobs=logprobs,
        entropies=entropies,
        drawn_logprobs=drawn_logprobs,
        finished=finished,
        num_forced=prompt.num_forced,
        request=row.job.request,
        member=row.job.member,
    )


def _stop_string_cut(request: Request, row: Row, num_new: int, tokenizer: Decoder) -> int | None:
    """How many drawn tokens are kept, if their text contains a stop string; None if not."""
    if not request.stop_strings:
        return None
    tokens = np.concatenate([tokens for tokens, _ in row.chunks])

    def stops(count: int) -> bool:
        text = tokenizer.decode(tokens[:count].tolist())
        return any(stop in text for stop in request.stop_strings)

    if not stops(len(tokens)):
        return None
    first = len(tokens) - num_new  # without them it did not stop
    return first + 1 + bisect.bisect_left(range(first + 1, len(tokens)), True, key=stops)


class _Account:
    """What `Progress` reports."""

    def __init__(self, total: int) -> None:
        self._began = time.monotonic()
        self.total, self.finished, self.tokens, self.steps = total, 0, 0, 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self._full_steps = self._full_tokens = 0  # while completions were waiting

    def note_segment(self, drawn: Drawn, slots: Slots) -> None:
        tokens = int(drawn.counts.sum())
        self.tokens += tokens
        self.steps += int(drawn.steps)
        if slots.waiting:
            self._full_steps += int(drawn.steps) * slots.num_rows
            self._full_tokens += tokens

    def progress(self) -> Progress:
        seconds = time.monotonic() - self._began
        return Progress(
            finished=self.finished,
            total=self.total,
            tokens=self.tokens,
            steps=self.steps,
            occupancy=self._full_tokens / self._full_steps if self._full_steps else 1.0,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            host_seconds=seconds - self.prefill_seconds - self.decode_seconds,
        )
