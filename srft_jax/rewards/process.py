"""The parent's ends of the worker processes and of the one they are forked from.

pool.py decides which worker is asked what, and what is done with a late or dead one. The channels:

    socket         pool -> forker: fork, kill;  forker -> pool: process ids        (forker.py)
    stdin pipe     pool -> worker: the setup, then requests, a line each           (worker.py)
    stdout pipe    worker -> pool: whether it is ready, then answers, a line each  (worker.py)
"""

import contextlib
import json
import math
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence

from srft_jax.rewards.verdicts import Verdict

COMMAND, ANSWER = struct.Struct("!cq"), struct.Struct("!q")  # what goes to and from the forker

FORKER_SECONDS = 60.0  # deadline for the forker to load, and for each fork


class Forker:
    """The running process of forker.py. Should it die, another one takes its place.

    Args:
        kinds: Kinds that it loads before it forks, keys of verifiers.PRELOADS.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = tuple(kinds)
        self._start()

    def fork(self, stdin: int, stdout: int) -> int:
        """Fork a worker that reads and writes copies of these pipes; return its process id."""
        for _ in range(2):  # the forker may die between request and answer: ask its successor
            self._send(b"f", 0, [stdin, stdout])
            with contextlib.suppress(ConnectionResetError):
                # An empty answer is the end of the socket: it has died.
                if answer := self._socket.recv(ANSWER.size):
                    return int(ANSWER.unpack(answer)[0])
        raise RuntimeError("the process that reward workers are forked from dies at once")

    def kill(self, process_id: int) -> None:
        """Kill a worker and all its children, without waiting for their end."""
        self._send(b"k", process_id)

    def close(self) -> None:
        """End the forker, which then kills its workers; all are gone on return."""
        self._socket.close()  # the forker takes the end of its input for the order to end
        self._process.wait()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "srft_jax.rewards.forker",
                    str(theirs.fileno()),
                    *self._kinds,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,  # out of reach of Ctrl-C
            )
        self._socket.settimeout(FORKER_SECONDS)
        if not self._socket.recv(ANSWER.size):
            raise RuntimeError("the process that reward workers are forked from did not start")

    def _send(self, command: bytes, number: int, descriptors: Sequence[int] = ()) -> None:
        """Send a command; if the forker has died, to its successor."""
        message = [COMMAND.pack(command, number)]
        try:
            socket.send_fds(self._socket, message, descriptors)
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            self._start()
            socket.send_fds(self._socket, message, descriptors)


class WorkerProcess:
    """A running worker. It answers in the order of asking: it works on the first one in flight.

    Args:
        forker: Process to fork it from.
        setup: First line for the worker.
        timeout_seconds: Deadline of one answer.
        start_seconds: Deadline for it to be ready.

    Attributes:
        ready: Whether it has loaded its verifiers; it is asked nothing before.
        failure: Why it will never be ready, as a sentence; empty as long as nothing is known.
        in_flight: Numbers of the requests it has not answered.
        deadline: When it is late with its next message, in time.monotonic() seconds.
        stdin, stdout: File descriptors of its pipes.
        outgoing: Bytes that its pipe has not taken yet.
    """

    def __init__(
        self, forker: Forker, setup: bytes, timeout_seconds: float, start_seconds: float
    ) -> None:
        self._forker, self._timeout_seconds = forker, timeout_seconds
        theirs_in, self.stdin = os.pipe()
        self.stdout, theirs_out = os.pipe()
        try:
            self._process_id = forker.fork(theirs_in, theirs_out)
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        os.set_blocking(self.stdin, False)  # a worker that hangs does not read: never wait for it
        self.outgoing, self._incoming = bytearray(setup), b""
        self.ready, self.failure = False, ""
        self.in_flight: deque[int] = deque()
        self.deadline = time.monotonic() + start_seconds

    def ask(self, number: int, line: bytes) -> None:
        """Queue a request; `wait` sends it as the worker takes it."""
        self.outgoing += line
        self.in_flight.append(number)
        if len(self.in_flight) == 1:  # it was idle: its time for this request begins now
            self._restart_clock()

    def send(self) -> None:
        """Write what the pipe takes now. If the worker has died, `receive` tells it, not this."""
        try:
            del self.outgoing[: os.write(self.stdin, self.outgoing)]
        except BrokenPipeError:
            self.outgoing.clear()

    def receive(self) -> Iterator[tuple[int, float, Verdict, str]]:
        """Yield answers that have arrived, as (number, reward, verdict, error).

        Its first message is no answer, but sets `ready` or `failure`.

        Raises:
            EOFError: the worker has ended, and all its answers were received.
        """
        data = os.read(self.stdout, 1 << 16)
        if not data:
            raise EOFError
        # The last line may be incomplete: it waits for the rest of it.
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        for message in map(json.loads, lines):
            if not self.ready:
                self.failure = message
                self.ready = not self.failure
                self.deadline = math.inf  # nothing has been asked yet
                continue
            # The answer is to the first in flight; the time for the next one begins.
            number = self.in_flight.popleft()
            self._restart_clock()
            yield number, *message

    def kill(self) -> None:
        """Kill the worker and close its pipes; answers that it has written are lost."""
        self._forker.kill(self._process_id)
        os.close(self.stdin)
        os.close(self.stdout)

    def _restart_clock(self) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        self.deadline = deadline if self.in_flight else math.inf  # an idle worker is never late


def wait(workers: Sequence[WorkerProcess], seconds: float) -> list[WorkerProcess]:
    """Wait at most `seconds` until a pipe can be read or written, and write what the pipes take.

    Returns:
        Workers that have written something or have ended.
    """
    poller, owners = select.poll(), {}
    for worker in workers:
        owners[worker.stdout] = worker
        poller.register(worker.stdout, select.POLLIN)
        if worker.outgoing:  # otherwise its empty pipe would end the wait at once
            owners[worker.stdin] = worker
            poller.register(worker.stdin, select.POLLOUT)
    pipes = [pipe for pipe, _ in poller.poll(max(0.0, seconds) * 1000)]
    for pipe in pipes:
        if pipe == owners[pipe].stdin:
            owners[pipe].send()
    return [owners[pipe] for pipe in pipes if pipe == owners[pipe].stdout]


def _environment() -> dict[str, str]:
    """Variables for a worker, which imports what this process can, on one core, without devices."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
