"""The process pool that runs verifiers: it cannot hang, and it survives what it runs.

Workers are processes, since nothing else stops a computation that holds the interpreter's lock.
Each has a few requests in flight, so that it need not wait for the parent, and answers them one by
one, so that the parent can time each. A late or dead worker is killed and replaced: its first
request in flight, which it was working on, is blamed; those behind it are asked again.
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
from srft_jax.rewards.process import Forker, WorkerProcess, wait
from srft_jax.rewards.user_scorers import is_user_kind
from srft_jax.rewards.verdicts import RewardRequest, RewardResult, Verdict
from srft_jax.rewards.verifiers import (
    KINDS,
    PRELOADS,
    check_kind,
    check_options,
    columns_of,
)

# Most requests in flight at one worker. With more, requests would line up behind a slow one that
# another worker could take.
MAX_IN_FLIGHT = 4

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _ScoreCall:
    """The progress of one call of `score`, whose requests are known by their numbers.

    A number is in `queue`, in a worker's `in_flight`, or a key of `results`. One that is asked
    twice (`_ask_again`) is in several of them.
    """

    requests: Sequence[RewardRequest]
    queue: deque[int]
    results: dict[int, RewardResult]


class RewardPool:
    """A context manager over worker processes, for one caller at a time.

    Args:
        num_workers: Number of processes.
        timeout_seconds: Deadline of one verdict.
        kinds: Kinds that requests may have. Those of verifiers.KINDS are always allowed; a user's
            own scorer `package.module:function` must be named here, and be importable from this
            process or from the current directory.
        probes: Requests that every worker tries before it is used. A user's scorer without one is
            probed with a made-up completion and no metadata; one that needs metadata needs a probe.
        options: Kind -> values of columns that a row does not have.
        start_seconds: Deadline for a worker to import the user's modules and to try the probes.

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
        start_seconds: float = 60.0,
    ) -> None:
        if num_workers < 1 or not timeout_seconds > 0:
            raise UsageError(
                f"rewards: {num_workers} workers and {timeout_seconds} s; both must be above 0"
            )
        self._num_workers = num_workers
        self._timeout_seconds, self._start_seconds = timeout_seconds, start_seconds
        self._user_kinds = tuple(kind for kind in dict.fromkeys(kinds) if is_user_kind(kind))
        for kind in kinds:
            check_kind(kind)
        self._options = options or {}
        for kind, values in self._options.items():
            check_options(kind, values)
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
        """Return results in the order of requests. Any thread may call it, but one at a time.

        Whatever a completion, a row or a scorer does becomes a verdict and raises nothing.

        Args:
            requests: Completions to verify.
            cancelled: An event that is set when nobody wants the results any more; looked at
                whenever a worker has answered, and every timeout_seconds.

        Raises:
            CancelledError: `cancelled` was set.
        """
        if not self._workers:
            raise RuntimeError("score needs an open pool: `with RewardPool(...) as pool`")
        self._preload({request.kind for request in requests} & PRELOADS.keys())
        # Replace workers that have died since the last call; no request is blamed for it.
        self._collect(_ScoreCall([], deque(), {}), seconds=0.0)
        call = _ScoreCall(requests, deque(range(len(requests))), {})
        try:
            # Until every request has its result: fill up the workers, then wait for news of them,
            # at longest until the first of them is late or `cancelled` is to be looked at again.
            while self._hand_out(call):
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError(f"{len(requests) - len(call.results)} results are missing")
                first_deadline = min(worker.deadline for worker in self._workers)
                self._collect(call, min(first_deadline - time.monotonic(), self._timeout_seconds))
        finally:
            # Workers are still busy when the call was cancelled, on Ctrl-C, and where a request
            # was asked twice. Their answers must not reach the next call, so they are killed.
            for worker in self._workers:
                if worker.in_flight:
                    self._replace(worker)
        return [call.results[number] for number in range(len(requests))]

    def _make_setup(self, probes: Sequence[RewardRequest]) -> bytes:
        """The first line for every worker: the kinds to load and the probes to try."""
        probed = {probe.kind for probe in probes}
        made_up = [
            RewardRequest(kind, "<think>\n1 + 1 = 2\n</think>\n2", "2")
            for kind in self._user_kinds
            if kind not in probed
        ]
        tried = (*probes, *made_up)
        self._probed = ", ".join(dict.fromkeys(probe.kind for probe in tried))
        fields = [
            self._fields(probe, self._start_seconds) | {"where": probe.where or "a probe"}
            for probe in tried
        ]
        try:
            return _line({"kinds": [*KINDS, *self._user_kinds], "probes": fields})
        except TypeError as error:
            raise UsageError(f"rewards: metadata of a probe has no JSON form: {error}") from error

    def _fields(self, request: RewardRequest, seconds: float) -> dict[str, Any]:
        """A request as a worker gets it, with its deadline."""
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
        """Restart all processes if a request has a slow-loading kind that was not announced."""
        if not kinds <= self._preloads:
            self._preloads |= kinds
            self._close()
            self._open()

    def _spawn(self) -> WorkerProcess:
        assert self._forker
        return WorkerProcess(self._forker, self._setup, self._timeout_seconds, self._start_seconds)

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
        """Wait until every worker has tried the probes; raise what goes wrong there."""
        names = self._probed
        while starting := [worker for worker in self._workers if not worker.ready]:
            first_deadline = min(worker.deadline for worker in starting)
            for worker in wait(starting, first_deadline - time.monotonic()):
                try:
                    list(worker.receive())  # sets `ready` or `failure`; there are no answers yet
                except EOFError:
                    raise UsageError(f"a worker died on loading or probing {names}") from None
                if worker.failure:
                    raise UsageError(worker.failure)
            if time.monotonic() >= first_deadline:
                raise UsageError(f"loading and probing {names} took over {self._start_seconds:g} s")

    def _hand_out(self, call: _ScoreCall) -> bool:
        """Fill up the workers; false when every request has its result."""
        for worker in self._workers:
            # The last few requests go out one by one: no worker sits idle next to a full one.
            # In: 3 requests queued, 2 workers.  Out: room for 1 at each.
            room = min(MAX_IN_FLIGHT, max(1, len(call.queue) // self._num_workers))
            # A worker that is still loading takes nothing; nor does one with no room left.
            while worker.ready and call.queue and len(worker.in_flight) < room:
                self._ask(worker, call)
            # The queue is empty now, if this worker is idle: help another one.
            if worker.ready and not worker.in_flight and self._ask_again(call):
                self._ask(worker, call)
        return len(call.results) < len(call.requests)

    def _ask_again(self, call: _ScoreCall) -> bool:
        """Queue a request again that lines up behind others at a worker; the first answer counts.

        Otherwise four slow requests at one worker would be slow one after the other. The last in
        line is taken, which that worker will begin latest.
        """
        in_flight = [number for worker in self._workers for number in worker.in_flight]
        for worker in self._workers:
            # The worker is at its first request; only those behind it wait.
            for number in reversed(list(worker.in_flight)[1:]):
                # Nobody has answered it yet, and only this worker has it.
                if number not in call.results and in_flight.count(number) == 1:
                    call.queue.append(number)
                    return True
        return False

    def _ask(self, worker: WorkerProcess, call: _ScoreCall) -> None:
        """Send the first request of the queue to a worker."""
        number = call.queue.popleft()
        try:
            line = _line(self._fields(call.requests[number], self._timeout_seconds))
        except Exception as error:  # a row may hold anything, also what JSON has no form for
            self._fail(call, number, "crash", f"{type(error).__name__}: {error}")
        else:
            worker.ask(number, line)

    def _collect(self, call: _ScoreCall, seconds: float) -> None:
        """Wait at most so long for messages, then replace workers that have died or are late."""
        for worker in wait(self._workers, seconds):
            try:
                for number, reward, verdict, error in worker.receive():
                    # If a request was asked twice, the second answer is dropped.
                    if number not in call.results:
                        call.results[number] = RewardResult(reward, verdict)
                        self._report(call, number, verdict, error)
            except EOFError:
                self._blame(worker, call, "crash", "the worker process died")
        # Looked at after receiving: a worker is not late because its parent is.
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            self._blame(worker, call, "timeout", "no verdict in time")

    def _blame(self, worker: WorkerProcess, call: _ScoreCall, verdict: Verdict, error: str) -> None:
        """Replace a worker, fail the request it was at and queue those behind it again.

        In: in flight [4, 5, 6], 4 hangs.  Out: 4 has its verdict, 5 and 6 are first in the queue.
        """
        self._replace(worker)
        # A worker that did not even start costs the next request its verdict. Otherwise, if no
        # worker ever starts, replacing would not end.
        blamed = worker.in_flight if worker.ready else call.queue
        if blamed:
            number = blamed.popleft()
            if number not in call.results:
                self._fail(call, number, verdict, worker.failure or error)
        # What another worker has too, or has answered, need not be asked again.
        elsewhere = {number for other in self._workers for number in other.in_flight}
        call.queue.extendleft(
            number
            for number in reversed(worker.in_flight)  # extendleft turns them round again
            if number not in elsewhere | call.results.keys()
        )

    def _fail(self, call: _ScoreCall, number: int, verdict: Verdict, error: str) -> None:
        call.results[number] = RewardResult(0.0, verdict)
        self._report(call, number, verdict, error)

    def _report(self, call: _ScoreCall, number: int, verdict: Verdict, error: str) -> None:
        """Log the first error of each kind and verdict; later ones are only counted as verdicts."""
        request = call.requests[number]
        if error and (request.kind, verdict) not in self._reported:
            self._reported.add((request.kind, verdict))
            where = f" ({request.where})" if request.where else ""
            logger.warning("reward %s, first %s%s: %s", request.kind, verdict, where, error)


def _line(message: dict[str, Any]) -> bytes:
    """JSON on one line, in ASCII: surrogates and NULs pass, and no newline is in it."""
    return json.dumps(message).encode() + b"\n"
