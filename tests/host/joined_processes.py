"""Processes that exchange numbers until one of them fails.

A script of its own, run with PORT COUNT NUMBER WHO HOW: process WHO fails as HOW says, or each of
them does where WHO is `all`.
"""

import os
import signal
import sys
import time

import jax

from srft_jax.config import DistributedConfig, RunConfig, UsageError, show_error
from srft_jax.host.peers import BEAT_SECONDS
from srft_jax.host.processes import joined
from srft_jax.mesh import gathered


def main(port: str, count: str, number: str, who: str, how: str) -> None:
    here = DistributedConfig(f"127.0.0.1:{port}", int(count), int(number))
    # Process 1 has another seed.
    seed = int(number) if how == "configuration" else 0
    with joined("train", RunConfig(seed=seed, distributed=here)) as config:
        assert config == RunConfig()
        print(
            "together", jax.process_count(), gathered(f"from process {number}" * 9 ** int(number))
        )
        while True:
            time.sleep(0.1)
            gathered(time.monotonic())
            if who in (number, "all"):
                if number == "0":
                    sys.stderr = SlowStream()
                fail(how)


class SlowStream:
    """Standard error whose first line takes longer than the others need to see each other fail."""

    def __init__(self) -> None:
        self._began = False

    def write(self, text: str) -> int:
        if not self._began:
            self._began = True
            time.sleep(2 * BEAT_SECONDS)
        return sys.__stderr__.write(text)

    def flush(self) -> None:
        sys.__stderr__.flush()


def fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "mistake":
        raise UsageError("training.row_length = 3 is too short")
    raise ArithmeticError("something broke")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UsageError as error:
        sys.exit(show_error(error))
