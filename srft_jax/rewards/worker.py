"""What a child process of the reward pool does, once forker.py has made it.

One JSON value a line. In: the setup, then requests. Out: "" once ready (or what is wrong with the
setup), then [reward, verdict, error] for each request, in order and one by one, so that the parent
knows which request a silent or dead worker was at. The worker ends at the end of its input.
It must not import JAX.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any, BinaryIO

from srft_jax.config import UsageError
from srft_jax.rewards.judging import Verifier
from srft_jax.rewards.verifiers import load

MAX_MEMORY_BYTES = 4 << 30  # of address space
MAX_ERROR = 200  # characters; keeps an answer within what a pipe writes in one piece
ORPHAN_SECONDS = 1.0


def main() -> None:
    requests, answers = _take_pipes()
    _limit_memory()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    setup = requests.readline()
    if not setup:  # the parent has died already
        return
    try:
        verifiers = _load(**json.loads(setup))
    except UsageError as error:
        return _send(answers, str(error))
    _send(answers, "")
    process_id = os.getpid()
    for line in requests:
        request = json.loads(line)
        answer = _answer(verifiers[request["kind"]], **request)
        if os.getpid() != process_id:  # a scorer has forked, and its child has come back too
            os._exit(0)
        _send(answers, answer)


def _take_pipes() -> tuple[BinaryIO, int]:
    """Moves the pipes away: a scorer that prints writes to stderr, one that reads finds nothing."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, answers


def _limit_memory() -> None:
    if sys.platform == "linux":  # elsewhere the system refuses the limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _load(kinds: list[str], probes: list[dict[str, Any]]) -> dict[str, Verifier]:
    """Every worker probes, so that what a scorer loads on its first call is then loaded."""
    verifiers = {kind: load(kind) for kind in kinds}
    for probe in probes:
        where = probe.pop("where")
        *_, error = _answer(verifiers[probe["kind"]], **probe)
        if error:
            columns = (
                f"columns {', '.join(probe['metadata'])}" if probe["metadata"] else "no metadata"
            )
            raise UsageError(f"reward {probe['kind']} fails on {where} with {columns}: {error}")
    return verifiers


def _answer(
    verifier: Verifier,
    *,
    kind: str,
    completion: str,
    gold: str,
    metadata: Mapping[str, Any],
    seconds: float,
) -> tuple[float, str, str]:
    # The parent kills a worker that is late. Should the parent be gone, the worker must still end,
    # be it asleep or in a computation that holds the interpreter's lock: SIGALRM, unhandled, does.
    signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_SECONDS)
    try:
        result = verifier(completion, gold, metadata)
        return result.reward, result.verdict, ""
    except Exception as error:  # it is the user's code: the parent reports it
        return 0.0, "crash", _describe(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__, limit=-1)[0]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return f"{type(error).__name__} at {place}: {error}"[:MAX_ERROR]


def _send(answers: int, message: Any) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")
