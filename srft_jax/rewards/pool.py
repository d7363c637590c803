"""The process pool that runs verifiers: it cannot hang, and it survives what it runs.

Workers are processes, since nothing else stops a computation that holds the interpreter's lock.
Each has a few requests in flight, so that it need not wait for the parent, and answers them one by
one, so that the parent can time each. A late or dead worker is replaced; the request it was at is
blamed, those behind it are asked again.
"""

import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from threading import Event
from typing import Any, Self

from srft_jax.config import UsageError
from srft_jax.rewards.process import START_SECONDS, Forker, WorkerProcess, wait
from srft_jax.rewards.user_scorers import is_user_kind
from srft_jax.rewards.verdicts import RewardRequest, RewardResult, Verdict
from srft_jax.rewards.verifiers import (
    KINDS,
    PRELOADS,
    check_kind,
    check_options,
    columns_of,
)

# Of one worker. More would line up behind a slow request what another worker could take.
MAX_IN_FLIGHT = 4

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One call of `score`.

    The number of a request is in `queue`, or in a worker's `in_flight`, or a key of `results`.
    """

    requests: Sequence[RewardRequest]
    queue: deque[int]
    results: dict[int, RewardResult]


class RewardPool:
    """Context manager over worker processes. One caller at a time.

    Args:
        num_workers: Processes.
        timeout_seconds: Of one verdict.
        kinds: What requests may ask for. The verifiers of verifiers.KINDS always go; a scorer
            `package.module:function` of the user's own must be named here, and be importable from
            this process or from the current directory.
        probes: Requests that every worker tries before it is used. A user's scorer without one is
            probed with a made-up completion and no metadata; one that needs metadata needs a probe.
        options: By kind, what stands in for columns that a row does not have.

    Raises:
        UsageError: a bad argument; on entry, a scorer that cannot be imported or fails on a probe.
    """

    def __init__(
        self,
        num_workers: int = 2,
        timeout_seconds: float = 2.0,
        kinds: Sequence[str] = ("final_answer",),
        probes: Sequence[RewardRequest] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if num_workers < 1 or not timeout_seconds > 0:
            raise UsageError(
                f"rewards: {num_workers} workers and {timeout_seconds} s; both must be above 0"
            )
        self._num_workers, self._timeout_seconds = num_workers, timeout_seconds
        self._user_kinds = tuple(kind for kind in dict.fromkeys(kinds) if is_user_kind(kind))
        for kind in kinds:
            check_kind(kind)
        self._options = options or {}
        for kind, of_kind in self._options.items():
            check_options(kind, of_kind)
        self._setup = self._make_setup(probes)
        self._preloads = set(kinds) & PRELOADS.keys()
        self._forker: Forker | None = None
        self._workers: list[WorkerProcess] = []
        self._reported: set[tuple[str, Verdict]] = set()

    def __enter__(self) -> Self:
        try:
            self._open()
            if self._user_kinds or self._probed:
                self._await_ready()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def score(
        self, requests: Sequence[RewardRequest], cancelled: Event | None = None
    ) -> list[RewardResult]:
        """Results in the order of requests. May be called from any thread, but by one at a time.

        Never raises for what a completion, a row or a scorer does: that is what verdicts are for.

        Args:
            requests: What to verify.
            cancelled: To be set where the results are no longer wanted; looked at whenever there
                is news, and every timeout_seconds.

        Raises:
            CancelledError: it was set.
        """
        if not self._workers:
            raise RuntimeError("score needs an open pool: `with RewardPool(...) as pool`")
        self._preload({request.kind for request in requests} & PRELOADS.keys())
        self._collect(_Job([], deque(), {}), seconds=0.0)  # who died since the last call, unblamed
        job = _Job(requests, deque(range(len(requests))), {})
        try:
            while self._hand_out(job):
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError(f"{len(requests) - len(job.results)} results are missing")
                first = min(worker.deadline for worker in self._workers)
                self._collect(job, min(first - time.monotonic(), self._timeout_seconds))
        finally:  # when cancelled or on Ctrl-C, answers to this call must not reach the next one
            for worker in self._workers:
                if worker.in_flight:
                    self._replace(worker)
        return [job.results[number] for number in range(len(requests))]

    def _make_setup(self, probes: Sequence[RewardRequest]) -> bytes:
        probed = {probe.kind for probe in probes}
        made_up = [
            RewardRequest(kind, "<think>\n1 + 1 = 2\n</think>\n2", "2")
            for kind in self._user_kinds
            if kind not in probed
        ]
        tried = (*probes, *made_up)
        self._probed = ", ".join(dict.fromkeys(probe.kind for probe in tried))
        fields = [
            self._fields(probe, START_SECONDS) | {"where": probe.where or "a probe"}
            for probe in tried
        ]
        try:
            return _line({"kinds": [*KINDS, *self._user_kinds], "probes": fields})
        except TypeError as error:
            raise UsageError(f"rewards: metadata of a probe has no JSON form: {error}") from error

    def _fields(self, request: RewardRequest, seconds: float) -> dict[str, Any]:
        if request.kind not in KINDS and request.kind not in self._user_kinds:
            raise UsageError(f"reward kind '{request.kind}' was not given to the pool")
        return dict(
            kind=request.kind,
            completion=request.completion,
            gold=request.gold,
            metadata=columns_of(
                request.kind, request.metadata, self._options.get(request.kind, {})
            ),
            seconds=seconds,
        )

    def _open(self) -> None:
        self._forker = Forker(sorted(self._preloads))
        for _ in range(self._num_workers):
            self._workers.append(self._spawn())

    def _preload(self, kinds: set[str]) -> None:
        """Starts afresh where a kind is asked for that takes long to load and was not named."""
        if not kinds <= self._preloads:
            self._preloads |= kinds
            self._close()
            self._open()

    def _spawn(self) -> WorkerProcess:
        assert self._forker
        return WorkerProcess(self._forker, self._setup, self._timeout_seconds)

    def _replace(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = self._spawn()

    def _close(self) -> None:
        while self._workers:
            self._workers.pop().kill()
        if self._forker:
            self._forker.close()
            self._forker = None

    def _await_ready(self) -> None:
        names = self._probed
        while starting := [worker for worker in self._workers if not worker.ready]:
            first = min(worker.deadline for worker in starting)
            for worker in wait(starting, first - time.monotonic()):
                try:
                    list(worker.receive())
                except EOFError:
                    raise UsageError(f"a worker died on loading or probing {names}") from None
                if worker.failure:
                    raise UsageError(worker.failure)
            if time.monotonic() >= first:
                raise UsageError(f"loading and probing {names} took over {START_SECONDS:g} s")

    def _hand_out(self, job: _Job) -> bool:
        """Fills up the workers; false when every request has its result."""
        for worker in self._workers:
            # The last few requests go out one by one: no worker sits idle next to a full one.
            room = min(MAX_IN_FLIGHT, max(1, len(job.queue) // self._num_workers))
            while worker.ready and job.queue and len(worker.in_flight) < room:
                self._ask(worker, job)
            if worker.ready and not worker.in_flight and self._waits_elsewhere(job):
                self._ask(worker, job)
        return len(job.results) < len(job.requests)

    def _waits_elsewhere(self, job: _Job) -> bool:
        """Queues a request again that lines up behind others; the first answer counts.

        Or four slow ones that went to the same worker would be slow one after the other. It is the
        last in line, which that worker is not about to begin.
        """
        in_flight = [number for worker in self._workers for number in worker.in_flight]
        for worker in self._workers:
            for number in reversed(list(worker.in_flight)[1:]):
                if number not in job.results and in_flight.count(number) == 1:
                    job.queue.append(number)
                    return True
        return False

    def _ask(self, worker: WorkerProcess, job: _Job) -> None:
        number = job.queue.popleft()
        try:
            line = _line(self._fields(job.requests[number], self._timeout_seconds))
        except Exception as error:  # a row may hold anything, also what JSON has no form for
            self._fail(job, number, "crash", f"{type(error).__name__}: {error}")
        else:
            worker.ask(number, line)

    def _collect(self, job: _Job, seconds: float) -> None:
        """Waits at most so long for messages; replaces workers that have died or are late."""
        for worker in wait(self._workers, seconds):
            try:
                for number, reward, verdict, error in worker.receive():
                    if number not in job.results:
                        job.results[number] = RewardResult(reward, verdict)
                        self._report(job, number, verdict, error)
            except EOFError:
                self._blame(worker, job, "crash", "the worker process died")
        now = time.monotonic()  # after receiving: a worker is not late because its parent is
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            self._blame(worker, job, "timeout", "no verdict in time")

    def _blame(self, worker: WorkerProcess, job: _Job, verdict: Verdict, error: str) -> None:
        """Replaces a worker, fails the request it was at and takes back those behind it.

        A worker that did not even start costs the next request its verdict: replacing must end.
        """
        self._replace(worker)
        blamed = worker.in_flight if worker.ready else job.queue
        if blamed:
            number = blamed.popleft()
            if number not in job.results:
                self._fail(job, number, verdict, worker.failure or error)
        held = {number for other in self._workers for number in other.in_flight}
        job.queue.extendleft(
            number
            for number in reversed(worker.in_flight)
            if number not in held | job.results.keys()
        )

    def _fail(self, job: _Job, number: int, verdict: Verdict, error: str) -> None:
        job.results[number] = RewardResult(0.0, verdict)
        self._report(job, number, verdict, error)

    def _report(self, job: _Job, number: int, verdict: Verdict, error: str) -> None:
        """Shows the first error of each kind; verdicts count the others."""
        request = job.requests[number]
        if error and (request.kind, verdict) not in self._reported:
            self._reported.add((request.kind, verdict))
            where = f" ({request.where})" if request.where else ""
            logger.warning("reward %s, first %s%s: %s", request.kind, verdict, where, error)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"  # ASCII: surrogates and NULs pass, no newline does
