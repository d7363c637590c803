"""`run.py` on completions that go by step and prompt alone; nothing is sampled.

A script of its own, run with STEP PROCESS and the arguments of run.py: that process is asked to
stop in the middle of that step.
"""

import signal
import sys

import jax
from dry_run import Trace

import run
from srft_jax.tasks import begin, train


def main(step: int, process: int, arguments: list[str]) -> int:
    collect = train.collect

    def collect_and_stop(sampler, scorer, sources, plan, stage, this_step, *args):
        if (this_step, jax.process_index()) == (step, process):
            signal.raise_signal(signal.SIGTERM)
        return collect(sampler, scorer, sources, plan, stage, this_step, *args)

    train.collect = collect_and_stop
    begin.Sampler = Trace().Sampler
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
