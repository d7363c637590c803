"""What processes of one run know of each other: that one has failed, and why.

Processes wait for each other in every collective, so one that is gone would keep the others waiting
for ever. Each has a thread that reads a few short entries in the store of JAX's coordination
service, which lives in process 0:

    srft/alive/1   "17 host-b, pid 4711"     rewritten again and again; process 0 notes who stops
    srft/failed/1  "ValueError: ..."         by process 1 itself, or by process 0 when 1 is silent
    srft/left/2    ""                        process 2 has read of a failure and ends; 0 ends last

If process 0 itself is killed, the store is gone: JAX then ends the others at once, with a message
of its own about the leader, task 0. It also ends them, some seconds later than we do, when a
machine is cut off.
"""

import os
import re
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, Self

import jax
from jax._src import distributed  # the store has no public door

from srft_jax.config import RunError, UsageError, show_error

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
# That process 0 stays for the others to read of a failure, at most.
_FAREWELL_SECONDS = 10.0
_ALIVE, _FAILED, _LEFT = "srft/alive/", "srft/failed/", "srft/left/"


class Peers:
    """Context manager: an error that leaves it ends this process and tells the others.

    Attributes:
        address: Host and process id of this process.
    """

    def __init__(self) -> None:
        self.address = f"{socket.gethostname()}, pid {os.getpid()}"
        self._number, self._count = jax.process_index(), jax.process_count()
        self._store: Any = distributed.global_state.client
        self._heard: dict[int, tuple[str, float]] = {}  # the last sign of life, and when it came
        self._ended = False
        self._watch = threading.Thread(target=self._watch_others, name="peers", daemon=True)

    def __enter__(self) -> Self:
        now = time.monotonic()
        self._heard = {number: ("", now) for number in range(self._count)}
        self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        if error is None:  # the thread goes on: at the exit, JAX waits for the other processes
            return
        if _OF_XLA.match(str(error)):
            # What a collective says when another process has gone. The thread will know which.
            self._watch.join(SILENT_SECONDS + 2 * BEAT_SECONDS)
        code = _shown(error)
        try:
            self._tell(self._number, f"{type(error).__name__}: {error}")
        finally:
            self._leave(code)

    def _watch_others(self) -> None:
        beats = 0
        while True:
            try:
                beats += 1
                mine = f"{_ALIVE}{self._number}"
                self._store.key_value_set(mine, f"{beats} {self.address}", allow_overwrite=True)
                if self._number == 0:
                    self._note_silent()
                failed = self._entries(_FAILED)
            except jax.errors.JaxRuntimeError as error:
                if self._ended:
                    return  # the store closes when all have
                self._end(f"process 0 is lost, in which the others meet: {error}")
            others = [number for number in failed if number != self._number]
            if others and self._number not in failed:
                first = min(others)
                self._end(f"process {first} of {self._count} has failed: {failed[first]}")
            time.sleep(BEAT_SECONDS)

    def _note_silent(self) -> None:
        """In process 0: enters those as failed that have not been heard from for too long."""
        now, alive = time.monotonic(), self._entries(_ALIVE)
        for number, (last, since) in self._heard.items():
            sign = alive.get(number, "")
            if sign != last:
                self._heard[number] = (sign, now)
            elif now - since > SILENT_SECONDS:
                where = last.partition(" ")[2] or "it never came"
                self._tell(
                    number,
                    f"no sign of life for {SILENT_SECONDS:.0f} s ({where}): it was killed, ran out "
                    "of memory or was cut off",
                )

    def _entries(self, prefix: str) -> dict[int, str]:
        entries = self._store.key_value_dir_get(prefix)
        return {int(key.rpartition("/")[2]): value for key, value in entries}

    def _tell(self, number: int, what: str) -> None:
        """Enters a failure."""
        self._store.key_value_set(f"{_FAILED}{number}", what, allow_overwrite=True)

    def _end(self, why: str) -> None:
        print(f"error: {why}\nthis was process {self._number}", file=sys.stderr, flush=True)
        self._leave(1)

    def _leave(self, code: int) -> None:
        """Ends this process now, whatever its other threads wait for."""
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            self._say_farewell()
        finally:  # also where the store is lost
            os._exit(code)

    def _say_farewell(self) -> None:
        """Process 0 leaves as the last: the store goes with it."""
        self._store.key_value_set(f"{_LEFT}{self._number}", "", allow_overwrite=True)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._number == 0 and time.monotonic() < deadline:
            if len(self._entries(_LEFT) | self._entries(_FAILED)) == self._count:
                return
            time.sleep(0.1)


# How XLA's errors begin, of whatever class: all but a lack of memory may come from the network.
_OF_XLA = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


def _shown(error: BaseException) -> int:
    """Prints an error as `run.py` or Python would; returns the exit code."""
    if isinstance(error, UsageError | RunError):
        return show_error(error)
    traceback.print_exception(error)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
