"""How the processes of one run learn that one of them has failed, and why.

Processes wait for each other in every collective, so one that is gone would keep the others waiting
for ever. Each has a thread that reads a few short entries in the store of JAX's coordination
service, which lives in process 0:

    srft/alive/1   "17 host-b, pid 4711"     sign of life; rewritten every 2 s, here the 17th time
    srft/failed/1  "ValueError: ..."         by process 1 itself, or by process 0 when 1 is silent
    srft/left/2    ""                        process 2 has read of a failure and ends; 0 ends last

If process 0 itself is killed, the store is gone: JAX then ends all other processes at once, with a
message of its own about the leader, task 0. JAX also ends them, some seconds later than we do, when
a machine is cut off.
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

# Time between two signs of life, and how long one may be missing.
BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
# How long process 0 stays, at most, for all other processes to read of a failure.
_FAREWELL_SECONDS = 10.0
_ALIVE, _FAILED, _LEFT = "srft/alive/", "srft/failed/", "srft/left/"


class Peers:
    """Context manager: an error that leaves it ends this process and tells all other processes.

    Attributes:
        address: Host and process id of this process.
    """

    def __init__(self) -> None:
        self.address = f"{socket.gethostname()}, pid {os.getpid()}"
        self._number, self._count = jax.process_index(), jax.process_count()
        self._store: Any = distributed.global_state.client
        # Process -> its last sign of life, and when it came. In process 0 alone.
        self._heard: dict[int, tuple[str, float]] = {}
        self._ended = False
        self._shows_error = False
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
        if _XLA_ERROR.match(str(error)):
            # A collective fails like this when another process has gone. The thread will find out
            # which one, and end this process with a better message: wait for it.
            self._watch.join(SILENT_SECONDS + 2 * BEAT_SECONDS)
        # All processes may have made the same mistake. From here on the thread does not end this
        # one because another has failed: it would cut off the message and replace the exit code.
        self._shows_error = True
        code = _show(error)
        try:
            self._tell(self._number, f"{type(error).__name__}: {error}")
        finally:
            self._leave(code)

    def _watch_others(self) -> None:
        """Give signs of life, and end this process when another one has failed."""
        beats = 0
        while True:
            try:
                beats += 1
                key = f"{_ALIVE}{self._number}"
                self._store.key_value_set(key, f"{beats} {self.address}", allow_overwrite=True)
                if self._number == 0:
                    self._note_silent()
                failed = self._entries(_FAILED)
            except jax.errors.JaxRuntimeError as error:
                if self._ended:
                    return  # the store closes when all processes have ended
                self._end(f"process 0 is lost, in which the others meet: {error}")
            others = [number for number in failed if number != self._number]
            if others and not self._shows_error:
                first = min(others)
                self._end(f"process {first} of {self._count} has failed: {failed[first]}")
            time.sleep(BEAT_SECONDS)

    def _note_silent(self) -> None:
        """In process 0: enter as failed each process whose last sign of life is too old."""
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
        """Return the store's entries with this prefix, by number of the process."""
        entries = self._store.key_value_dir_get(prefix)
        return {int(key.rpartition("/")[2]): value for key, value in entries}

    def _tell(self, number: int, what: str) -> None:
        """Enter a process as failed."""
        self._store.key_value_set(f"{_FAILED}{number}", what, allow_overwrite=True)

    def _end(self, why: str) -> None:
        print(f"error: {why}\nthis was process {self._number}", file=sys.stderr, flush=True)
        self._leave(1)

    def _leave(self, code: int) -> None:
        """End this process now, whatever its other threads wait for."""
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            self._say_farewell()
        finally:  # also where the store is lost
            os._exit(code)

    def _say_farewell(self) -> None:
        """Enter this process as gone. Process 0 then waits for all others: it holds the store."""
        self._store.key_value_set(f"{_LEFT}{self._number}", "", allow_overwrite=True)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._number == 0 and time.monotonic() < deadline:
            # A process that was killed has failed and never enters that it left.
            if len(self._entries(_LEFT) | self._entries(_FAILED)) == self._count:
                return
            time.sleep(0.1)


# Beginnings of XLA's errors that may come from the network: all but a lack of memory.
_XLA_ERROR = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


def _show(error: BaseException) -> int:
    """Print an error as `run.py` or Python would, and return the exit code."""
    if isinstance(error, UsageError | RunError):
        return show_error(error)
    traceback.print_exception(error)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
