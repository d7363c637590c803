"""The main function of a worker process of the reward pool, which forker.py has forked.

It reads and writes one JSON value a line. In: the setup, then requests. Out: "" once it is ready
(or what is wrong with the setup), then [reward, verdict, error] for each request, in order and one
by one, so that the parent knows which request a silent or dead worker was at. The worker ends at
the end of its input. It must not import JAX.
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
from srft_jax.rewards.verifiers import load_verifier

MAX_MEMORY_BYTES = 4 << 30  # of address space
MAX_ERROR = 200  # characters; keeps an answer within what a pipe writes in one piece
ORPHAN_SECONDS = 1.0  # beyond a request's deadline, after which a worker kills itself


def main() -> None:
    """Load the verifiers, try the probes, then answer requests until the input ends."""
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
    """Move the pipes away from descriptors 0 and 1, for this function's caller alone.

    A scorer that prints then writes to stderr, and one that reads finds nothing.
    """
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
    """The verifiers of these kinds, after the probes.

    Every worker probes, so that a scorer has loaded its data before the first timed request.
    """
    verifiers = {kind: load_verifier(kind) for kind in kinds}
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
    """[reward, verdict, error] of one request."""
    # The parent kills a late worker. Should the parent be gone, the worker must still end, be it
    # asleep or in a computation that holds the interpreter's lock: SIGALRM, unhandled, ends it.
    signal.setitimer(signal.ITIMER_REAL, seconds + ORPHAN_SECONDS)
    try:
        result = verifier(completion, gold, metadata)
        return result.reward, result.verdict, ""
    except Exception as error:  # whatever the user's code raises: the parent reports it
        return 0.0, "crash", _describe(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _describe(error: Exception) -> str:
    """In: KeyError('a') in line 3 of scorers.py.  Out: "KeyError at scorers.py:3: 'a'"."""
    where = traceback.extract_tb(error.__traceback__, limit=-1)[0]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return f"{type(error).__name__} at {place}: {error}"[:MAX_ERROR]


def _send(answers: int, message: Any) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")
