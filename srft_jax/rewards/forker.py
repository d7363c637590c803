"""The process that workers are forked from: `python -m srft_jax.rewards.forker`; see process.py.

It loads slow modules once, so that a new worker is ready milliseconds after another was killed. It
loads none of the user's modules: their threads and locks may not survive a fork. Its messages are a
letter and a number:

    f 0    fork a worker; two file descriptors come along, its input and output. The answer is the
           worker's process id.
    k PID  kill that worker and all its children; no answer.

The first number that it writes, unasked, says that it has loaded. At the end of its input it kills
all workers and ends.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import traceback

from srft_jax.rewards import worker
from srft_jax.rewards.process import ANSWER, COMMAND
from srft_jax.rewards.verifiers import PRELOADS


def main(parent: socket.socket, kinds: list[str]) -> None:
    """Load the kinds' modules, then fork and kill as told until the parent closes the socket."""
    for kind in kinds:
        PRELOADS[kind]()
    gc.freeze()  # or a worker's first garbage collection would copy all these pages
    parent.sendall(ANSWER.pack(0))
    running: set[int] = set()
    killed: set[int] = set()  # not yet waited for, so their process ids are not used again
    while True:
        data, descriptors, _, _ = socket.recv_fds(parent, COMMAND.size, 2)
        if not data:  # the parent has closed the socket or is dead
            break
        command, number = COMMAND.unpack(data)
        if command == b"f":
            running.add(process_id := _fork(parent, *descriptors))
            parent.sendall(ANSWER.pack(process_id))
        else:
            _kill(number)
            # Only our own children can be waited for; the worker may be an earlier forker's.
            killed |= running & {number}
            running -= killed
        # Forget the killed ones that have ended, without waiting for the others.
        killed -= {process_id for process_id in killed if os.waitpid(process_id, os.WNOHANG)[0]}
    for process_id in running:
        _kill(process_id)
    for process_id in running | killed:
        os.waitpid(process_id, 0)


def _fork(parent: socket.socket, stdin: int, stdout: int) -> int:
    """Fork a worker on these descriptors, which are then closed here; return its process id."""
    process_id = os.fork()
    if process_id == 0:
        _work(parent, stdin, stdout)
    os.close(stdin)
    os.close(stdout)
    # A worker leads a process group, so that its children are killed with it. The child makes it,
    # too: whichever comes first must not be overtaken by a kill.
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(process_id, process_id)
    return process_id


def _work(parent: socket.socket, stdin: int, stdout: int) -> None:
    """Run the worker, in the child process; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        parent.close()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.close(stdin)
        os.close(stdout)
        with contextlib.suppress(BrokenPipeError):  # the pool has closed meanwhile
            worker.main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _kill(process_id: int) -> None:
    """Kill a worker's process group."""
    # Nobody has waited for the worker yet, so no other process group can have its number.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
