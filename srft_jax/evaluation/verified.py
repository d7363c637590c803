"""Rollouts with verdicts: completions become text and are verified while others still decode.

The device decodes, a thread turns ids into text and waits for the pool, processes verify. The
thread takes all that waits at once, so that the pool has work for every worker.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Self

import jax

from srft_jax.config import ModelConfig, ShapingConfig
from srft_jax.data.examples import Example
from srft_jax.evaluation.verdicts import Decoder, Scored, completion_text, verify
from srft_jax.models.decoder import Params
from srft_jax.rewards import RewardPool
from srft_jax.rollout.requests import Completion, Progress, Request, SamplingConfig
from srft_jax.rollout.scheduler import Observer, sample_stream

Verified = tuple[Completion, Scored]

NO_PROGRESS = Progress(0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0)  # of a rollout without requests


@dataclasses.dataclass(frozen=True)
class _Job:
    example: Example
    completion: Completion
    verdict: Future[Scored]


class BackgroundVerifier:
    """Verifies completions in a thread of its own. A context manager; the pool's only caller.

    On leaving, what has no verdict yet is given up, its future cancelled or failed. That takes no
    longer than the deadline of one verdict, and leaves no thread behind.
    """

    def __init__(
        self, pool: RewardPool, tokenizer: Decoder, shaping: Sequence[ShapingConfig] = ()
    ) -> None:
        self._pool = pool
        self._tokenizer = tokenizer
        self._shaping = shaping
        self._waiting: deque[_Job] = deque()
        self._failure: BaseException | None = None
        self._closed = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)
        for job in self._waiting:
            job.verdict.cancel()

    def submit(self, example: Example, completion: Completion) -> Future[Scored]:
        """The verdict to come. Whatever the thread has raised so far is raised here again."""
        if self._failure is not None:
            raise self._failure
        job = _Job(example, completion, Future())
        self._waiting.append(job)
        self._thread.submit(self._verify_waiting)
        return job.verdict

    def _verify_waiting(self) -> None:
        """In the thread, once for each `submit`; what one call takes, later ones do not find."""
        jobs = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not jobs:
            return
        try:
            tokens = [job.completion.tokens.tolist() for job in jobs]
            scored = verify(
                self._pool,
                [job.example for job in jobs],
                [completion_text(self._tokenizer, ids) for ids in tokens],
                [len(ids) for ids in tokens],
                self._shaping,
                self._closed,
            )
        except BaseException as error:  # it is the caller's, who waits for it in another thread
            self._failure = error
            for job in jobs:
                job.verdict.set_exception(error)
        else:
            for job, one in zip(jobs, scored, strict=True):
                job.verdict.set_result(one)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """What `sample_verified` returns.

    Attributes:
        groups: Completions with their verdicts, in the order of requests and of group members.
        progress: Of the sampler, at its end.
        reward_wait: Seconds from the last completion to the last verdict.
    """

    groups: list[list[Verified]]
    progress: Progress
    reward_wait: float


def sample_verified(
    params: Params,
    model_config: ModelConfig,
    requests: Sequence[Request],
    examples: Sequence[Example],
    key: jax.Array,
    sampling_config: SamplingConfig,
    tokenizer: Decoder,
    pool: RewardPool,
    observer: Observer | None = None,
    shaping: Sequence[ShapingConfig] = (),
) -> Rollout:
    """Completes `requests[i]` and verifies each completion as an answer to `examples[i]`.

    Args:
        params: Of the policy.
        model_config: Architecture.
        requests: Prompts.
        examples: As many.
        key: PRNG key.
        sampling_config: Temperature, lengths, shapes.
        tokenizer: For the text.
        pool: Verifiers; nobody else may call it meanwhile.
        observer: Called with the sampler's progress, again and again.
        shaping: Terms of the reward beside the examples' own verifiers.
    """
    progress = NO_PROGRESS

    def observe(now: Progress) -> None:
        nonlocal progress
        progress = now
        if observer is not None:
            observer(now)

    pending: dict[tuple[int, int], tuple[Completion, Future[Scored]]] = {}
    with BackgroundVerifier(pool, tokenizer, shaping) as verifier:
        for one in sample_stream(
            params,
            model_config,
            requests,
            key,
            sampling_config,
            tokenizer=tokenizer,
            observer=observe,
        ):
            verdict = verifier.submit(examples[one.request], one)
            pending[one.request, one.member] = one, verdict
        sampled = time.monotonic()
        done = {place: (one, verdict.result()) for place, (one, verdict) in pending.items()}
    groups = [
        [done[index, member] for member in range(request.group_size)]
        for index, request in enumerate(requests)
    ]
    return Rollout(groups, progress, time.monotonic() - sampled)
