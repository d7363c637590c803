"""Two processes that decode in lock step each get what they would get alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("several_processes.py")
ROOT = Path(__file__).parents[2]
# Nearly all of the time would go to compiling.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(*arguments):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def printed():
    """What processes 0 and 1 print, and what the one prints that samples for both."""
    port = free_port()
    processes = [start(port, 0), start(port, 1), start()]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_gets_what_it_gets_alone(printed, number):
    together, alone = printed[number], printed[2][number]
    lengths = [[len(tokens) for tokens, _ in completions] for completions in alone]
    assert [len(completions) for completions in lengths] == [[10, 0, 0], [2, 4, 0]][number]
    assert max(map(max, filter(None, lengths))) == 40
    for completions, expected in zip(together, alone, strict=True):
        assert [tokens for tokens, _ in completions] == [tokens for tokens, _ in expected]
        for (_, logprobs), (_, wanted) in zip(completions, expected, strict=True):
            np.testing.assert_allclose(logprobs, wanted, atol=1e-5)


def test_processes_have_keys_of_their_own(printed):
    """Or a process could have been given the other's rows."""
    assert printed[0][0][8:] != printed[1][0]
