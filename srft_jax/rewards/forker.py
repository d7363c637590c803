"""The process that workers are forked from: `python -m srft_jax.rewards.forker`; see process.py.

It loads once what is slow to load, so that a worker is there within milliseconds after another was
killed. It loads nothing of the user's: what a module starts or locks may not survive a fork.
Messages are a letter and a number; each is answered by a number, the first one unasked.

    f 0    fork a worker; two file descriptors come along, its input and output.  Out: process id
    k PID  kill that worker and everything it has started.                        Out: 0
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
    """Ends with its parent: workers then do so by themselves."""
    for kind in kinds:
        PRELOADS[kind]()
    gc.freeze()  # or a worker's first collection would copy all of it
    parent.sendall(ANSWER.pack(0))
    while True:
        message, descriptors, _, _ = socket.recv_fds(parent, COMMAND.size, 2)
        if not message:
            return
        command, number = COMMAND.unpack(message)
        parent.sendall(
            ANSWER.pack(_fork(parent, *descriptors) if command == b"f" else _kill(number))
        )


def _fork(parent: socket.socket, stdin: int, stdout: int) -> int:
    process_id = os.fork()
    if process_id == 0:
        _work(parent, stdin, stdout)
    os.close(stdin)
    os.close(stdout)
    # In the child too: whoever comes first. A group of its own is killed with all its children.
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(process_id, process_id)
    return process_id


def _work(parent: socket.socket, stdin: int, stdout: int) -> None:
    """In the child; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        parent.close()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.close(stdin)
        os.close(stdout)
        worker.main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _kill(process_id: int) -> int:
    # Before waiting for it: until then no other process group can have this number.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # it was another forker's
        os.waitpid(process_id, 0)
    return 0


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
