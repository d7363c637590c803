"""Rollouts with verdicts: completions become text and are verified while others still decode.

The device decodes, a thread turns ids into text and waits for the pool, processes verify. The
thread takes all that waits at once, so that the pool has work for every worker.

Several processes share the requests; afterwards each has the completions and verdicts of all.
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
from srft_jax.experience.verdicts import Decoder, Scored, completion_text, verify
from srft_jax.mesh import gathered
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
        progress: Of the sampler, at its end; counts are of all processes, seconds of this one.
        reward_wait: Seconds from the last completion to the last verdict, of this process.
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
        requests: Prompts, the same in all processes.
        examples: As many.
        key: PRNG key, the same in all processes.
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

    own = own_requests(examples)
    pending: dict[tuple[int, int], tuple[Completion, Future[Scored]]] = {}
    with BackgroundVerifier(pool, tokenizer, shaping) as verifier:
        for one in sample_stream(
            params,
            model_config,
            [dataclasses.replace(requests[number], number=number) for number in own],
            key,
            sampling_config,
            tokenizer=tokenizer,
            observer=observe,
        ):
            number = own[one.request]
            verdict = verifier.submit(examples[number], one)
            pending[number, one.member] = dataclasses.replace(one, request=number), verdict
        sampled = time.monotonic()
        scored = {place: (one, verdict.result()) for place, (one, verdict) in pending.items()}
        reward_wait = time.monotonic() - sampled
    done = _of_all_processes(scored, examples)
    groups = [
        [done[number, member] for member in range(request.group_size)]
        for number, request in enumerate(requests)
    ]
    return Rollout(groups, _of_all(progress), reward_wait)


def own_requests(examples: Sequence[Example]) -> list[int]:
    """Numbers of the requests that this process completes: processes take turns, prompt by prompt.

    Several requests in a row may be of one example, whose prompt is then prefilled once.
    In: examples a a b c c, two processes.  Out: [0, 1, 3, 4] and [2].
    """
    turn, count = jax.process_index(), jax.process_count()
    own, prompt = [], -1
    for number, example in enumerate(examples):
        prompt += number == 0 or example is not examples[number - 1]
        if prompt % count == turn:
            own.append(number)
    return own


def _of_all_processes(
    own: dict[tuple[int, int], Verified], examples: Sequence[Example]
) -> dict[tuple[int, int], Verified]:
    """By number of the request and of the member. Examples are everywhere: they stay where they
    are, with their demonstrations."""
    sent = [
        (place, one, (scored.text, scored.accuracy, scored.verdict, scored.shaping))
        for place, (one, scored) in own.items()
    ]
    return {
        place: (one, Scored(examples[place[0]], *verdict))
        for of_process in gathered(sent)
        for place, one, verdict in of_process
    }


def _of_all(progress: Progress) -> Progress:
    everyone = gathered(progress)
    return dataclasses.replace(
        progress,
        finished=sum(one.finished for one in everyone),
        total=sum(one.total for one in everyone),
        tokens=sum(one.tokens for one in everyone),
    )
