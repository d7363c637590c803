"""Trajectories with verdicts: answers become text and are verified while others still decode.

The device decodes, a thread turns ids into text and waits for the pool, processes verify. The
thread takes everything that waits at once, so that the pool has work for every worker.

Several processes share the groups; afterwards each has the trajectories of all.
"""

import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Self

import jax

from srft_jax.batch import Trajectory
from srft_jax.data.examples import Example
from srft_jax.experience.scoring import Scorer
from srft_jax.mesh import gathered
from srft_jax.rollout import Observer, Request, RolloutProgress, Sampler

NO_PROGRESS = RolloutProgress(0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0)  # of a rollout without requests


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A trajectory that waits for its verdict."""

    example: Example
    trajectory: Trajectory
    verdict: Future[Trajectory]


class BackgroundScorer:
    """Scores trajectories in a thread of its own. A context manager; the pool's only caller.

    On leaving, what has no verdict yet is given up, its future cancelled or failed. That takes no
    longer than the deadline of one verdict, and leaves no thread behind.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._waiting: deque[_Pending] = deque()
        self._failure: BaseException | None = None
        self._closed = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verifier")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)
        for pending in self._waiting:
            pending.verdict.cancel()

    def submit(self, example: Example, trajectory: Trajectory) -> Future[Trajectory]:
        """Return the scored trajectory to come.

        Whatever the thread has raised so far is raised here again.
        """
        if self._failure is not None:
            raise self._failure
        pending = _Pending(example, trajectory, Future())
        self._waiting.append(pending)
        self._thread.submit(self._score_waiting)
        return pending.verdict

    def _score_waiting(self) -> None:
        """Score everything that waits. The thread runs this once for each `submit`."""
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not batch:
            return
        try:
            scored = self._scorer.score(
                [pending.example for pending in batch],
                [pending.trajectory for pending in batch],
                self._closed,
            )
        except BaseException as error:  # it is the caller's, who waits for it in another thread
            self._failure = error
            for pending in batch:
                pending.verdict.set_exception(error)
        else:
            for pending, trajectory in zip(batch, scored, strict=True):
                pending.verdict.set_result(trajectory)


@dataclasses.dataclass(frozen=True)
class VerifiedRollout:
    """What `sample_verified` returns.

    Attributes:
        groups: Scored trajectories, in the order of groups and of members.
        progress: The sampler's at its end; counts are of all processes, seconds of this one.
        reward_wait: Seconds from the last trajectory to the last verdict, of this process.
    """

    groups: list[list[Trajectory]]
    progress: RolloutProgress
    reward_wait: float


def sample_verified(
    sampler: Sampler,
    requests: Sequence[Request],
    examples: Sequence[Example],
    key: jax.Array,
    scorer: Scorer,
    observer: Observer | None = None,
    *,
    slots: int | None = None,
) -> VerifiedRollout:
    """Complete requests, and verify each completion as an answer to its group's example.

    Args:
        sampler: Holds the policy's parameters.
        requests: Prompts with the numbers of their groups, the same in all processes.
        examples: What each group answers, by number.
        key: PRNG key, the same in all processes.
        scorer: Verifiers; nobody else may call its pool meanwhile.
        observer: Called with the sampler's progress, again and again.
        slots: Most completions decoded side by side; None takes the sampler's.
    """
    progress = NO_PROGRESS

    def observe(now: RolloutProgress) -> None:
        nonlocal progress
        progress = now
        if observer is not None:
            observer(now)

    here = requests_here(requests, jax.process_index(), jax.process_count())
    sampler.submit(here, key, slots=slots)
    with BackgroundScorer(scorer) as background:
        pending = [
            background.submit(examples[trajectory.group], trajectory)
            for trajectory in sampler.stream(observe)
        ]
        sampled = time.monotonic()
        scored = [verdict.result() for verdict in pending]
        reward_wait = time.monotonic() - sampled
    groups: defaultdict[int, list[Trajectory]] = defaultdict(list)
    for trajectories in gathered(scored):
        for trajectory in trajectories:
            groups[trajectory.group].append(trajectory)
    in_order = [
        sorted(groups[number], key=lambda trajectory: trajectory.member)
        for number in range(len(examples))
    ]
    return VerifiedRollout(in_order, _summed(progress), reward_wait)


def requests_here(requests: Sequence[Request], process: int, num_processes: int) -> list[Request]:
    """Return the requests that a process completes: processes take turns, group by group.

    In: groups 0 0 1 2 2, two processes.  Out: groups 0 and 2 for process 0, group 1 for process 1.

    Raises:
        ValueError: some request has no number of a group.
    """
    here = []
    for number, request in enumerate(requests):
        if request.group is None:
            raise ValueError(f"request {number} does not say which example it answers")
        if request.group % num_processes == process:
            here.append(request)
    return here


def _summed(progress: RolloutProgress) -> RolloutProgress:
    """Counts of all processes."""
    everyone = gathered(progress)
    return dataclasses.replace(
        progress,
        finished=sum(one.finished for one in everyone),
        total=sum(one.total for one in everyone),
        tokens=sum(one.tokens for one in everyone),
    )
