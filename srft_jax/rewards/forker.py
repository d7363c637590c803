"""The process that workers are forked from: `python -m srft_jax.rewards.forker`; see process.py.

It loads once what is slow to load, so that a worker is there within milliseconds after another was
killed. It loads nothing of the user's: what a module starts or locks may not survive a fork.
Its messages are a letter and a number:

    f 0    fork a worker; two file descriptors come along, its input and output. It answers with
           the worker's process id.
    k PID  kill that worker and everything it has started; no answer.

A first number, unasked, says that it has loaded. At the end of its input it kills all workers.
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
    """Obeys until its parent is gone."""
    for kind in kinds:
        PRELOADS[kind]()
    gc.freeze()  # or a worker's first collection would copy all of it
    parent.sendall(ANSWER.pack(0))
    running: set[int] = set()
    killed: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(parent, COMMAND.size, 2)
        if not data:
            break
        command, number = COMMAND.unpack(data)
        if command == b"f":
            running.add(process_id := _fork(parent, *descriptors))
            parent.sendall(ANSWER.pack(process_id))
        else:
            _kill(number)
            killed |= running & {number}  # another one may be of a forker before this one
            running -= killed
        killed -= {one for one in killed if os.waitpid(one, os.WNOHANG)[0]}
    for process_id in running:
        _kill(process_id)
    for process_id in running | killed:
        os.waitpid(process_id, 0)


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
        with contextlib.suppress(BrokenPipeError):  # the pool has closed meanwhile
            worker.main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _kill(process_id: int) -> None:
    # Nobody has waited for it yet: no other process group can have this number.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
