"""The parent's ends of the worker processes and of the one they are forked from.

What to ask whom, and what to do with a late or dead worker, is decided in pool.py.
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

START_SECONDS = 60.0  # to import the user's modules and to probe them


class Forker:
    """The running process of forker.py. Should it die, another one takes its place.

    Args:
        kinds: What it loads before it forks, keys of verifiers.PRELOADS.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self._start()

    def fork(self, stdin: int, stdout: int) -> int:
        """Process id of a new worker that reads and writes copies of these."""
        for _ in range(2):  # it may have died on the way
            self._send(b"f", 0, [stdin, stdout])
            with contextlib.suppress(ConnectionResetError):
                if answer := self._socket.recv(ANSWER.size):
                    return int(ANSWER.unpack(answer)[0])
        raise RuntimeError("the process that reward workers are forked from dies at once")

    def kill(self, process_id: int) -> None:
        """Kills a worker and what it has started, without waiting for its end."""
        self._send(b"k", process_id)

    def close(self) -> None:
        """All workers are gone on return."""
        self._socket.close()
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
                    *self.kinds,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,  # out of reach of Ctrl-C
            )
        self._socket.settimeout(START_SECONDS)
        if not self._socket.recv(ANSWER.size):
            raise RuntimeError("the process that reward workers are forked from did not start")

    def _send(self, command: bytes, number: int, descriptors: Sequence[int] = ()) -> None:
        message = [COMMAND.pack(command, number)]
        try:
            socket.send_fds(self._socket, message, descriptors)
        except (BrokenPipeError, ConnectionResetError):
            self.close()
            self._start()
            socket.send_fds(self._socket, message, descriptors)


class WorkerProcess:
    """A running worker. It answers in the order it was asked: it is at the first one in flight.

    Attributes:
        ready: It has loaded its verifiers; nothing is asked before.
        failure: Why it will never be ready, as a sentence; empty as long as nothing is known.
        in_flight: Numbers of the requests it has not answered.
        deadline: When it is late with its next message, in time.monotonic() seconds.
        stdin, stdout: Numbers of its pipes.
        outgoing: Bytes that its pipe has not taken yet.
    """

    def __init__(self, forker: Forker, setup: bytes, timeout_seconds: float) -> None:
        self._forker, self._timeout_seconds = forker, timeout_seconds
        theirs_in, self.stdin = os.pipe()
        self.stdout, theirs_out = os.pipe()
        try:
            self._process_id = forker.fork(theirs_in, theirs_out)
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        os.set_blocking(self.stdin, False)
        self.outgoing, self._incoming = bytearray(setup), b""
        self.ready, self.failure = False, ""
        self.in_flight: deque[int] = deque()
        self.deadline = time.monotonic() + START_SECONDS

    def ask(self, number: int, line: bytes) -> None:
        """Queues a request; it is sent as the worker takes it."""
        self.outgoing += line
        self.in_flight.append(number)
        if len(self.in_flight) == 1:
            self._restart_clock()

    def send(self) -> None:
        """Writes what the pipe takes now. That a worker has died is told by `receive`, not here."""
        try:
            del self.outgoing[: os.write(self.stdin, self.outgoing)]
        except BrokenPipeError:
            self.outgoing.clear()

    def receive(self) -> Iterator[tuple[int, float, Verdict, str]]:
        """Answers that have arrived, as (number, reward, verdict, error); sets `ready`, `failure`.

        Raises:
            EOFError: the worker has ended, and all it said was received.
        """
        data = os.read(self.stdout, 1 << 16)
        if not data:
            raise EOFError
        *lines, self._incoming = (self._incoming + data).split(b"\n")
        for message in map(json.loads, lines):
            if not self.ready:
                self.failure = message
                self.ready = not self.failure
                self.deadline = math.inf
                continue
            number = self.in_flight.popleft()
            self._restart_clock()
            yield number, *message

    def kill(self) -> None:
        self._forker.kill(self._process_id)
        os.close(self.stdin)
        os.close(self.stdout)

    def _restart_clock(self) -> None:
        late = time.monotonic() + self._timeout_seconds
        self.deadline = late if self.in_flight else math.inf


def wait(workers: Sequence[WorkerProcess], seconds: float) -> list[WorkerProcess]:
    """Sends what the pipes take, for at most `seconds`; returns who has something to receive."""
    poller, of_pipe = select.poll(), {}
    for worker in workers:
        of_pipe[worker.stdout] = worker
        poller.register(worker.stdout, select.POLLIN)
        if worker.outgoing:
            of_pipe[worker.stdin] = worker
            poller.register(worker.stdin, select.POLLOUT)
    pipes = [pipe for pipe, _ in poller.poll(max(0.0, seconds) * 1000)]
    for pipe in pipes:
        if pipe == of_pipe[pipe].stdin:
            of_pipe[pipe].send()
    return [of_pipe[pipe] for pipe in pipes if pipe == of_pipe[pipe].stdout]


def _environment() -> dict[str, str]:
    """A worker imports what this process can, leaves the accelerator alone and uses one core."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
