"""Ctrl-C and preemption: finish the step, save, say how to go on."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from srft_jax.mesh import largest_of_processes


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM came; a second signal acts at once.

    All processes must call the function together: it is true in all of them as soon as one of them
    has got a signal.
    """
    requested = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        restore()  # so that the next signal acts as if nobody had listened

    # `handle` may run as soon as it is installed, so what it calls is bound before that.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in before:
            if not requested:  # else a signal has come already, and the next one acts at once
                signal.signal(number, handle)
        yield lambda: bool(largest_of_processes(requested)[0])
    finally:
        restore()
