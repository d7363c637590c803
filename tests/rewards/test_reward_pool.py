"""The pool with real worker processes. The scorers are in user_scorers.py."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest

from srft_jax.config import UsageError
from srft_jax.rewards import RewardPool, RewardRequest
from srft_jax.rewards.verifiers import columns_of

BEHAVE = "user_scorers:behave"
TIMEOUT = 0.5


@pytest.fixture(autouse=True)
def scorers_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parent))
        with RewardPool(timeout_seconds=TIMEOUT, kinds=[BEHAVE]) as pool:
            yield pool


def easy(count: int) -> list[RewardRequest]:
    """Requests of which every third is wrong and the others are right."""
    return [
        RewardRequest("final_answer", f"<think>{i}</think>{i}", str(i if i % 3 else i + 1))
        for i in range(count)
    ]


EASY_VERDICTS = ["wrong", "right", "right"]


def verdicts(pool: RewardPool, requests: list[RewardRequest]) -> list[str]:
    return [result.verdict for result in pool.score(requests)]


def behave(pool: RewardPool, *completions: str) -> list[str]:
    return verdicts(pool, [RewardRequest(BEHAVE, completion, "") for completion in completions])


def until(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_easy_verdicts_are_fast_and_in_order(pool: RewardPool) -> None:
    assert verdicts(pool, easy(300)) == EASY_VERDICTS * 100
    requests = easy(6000)
    start = time.monotonic()
    assert verdicts(pool, requests) == EASY_VERDICTS * 2000
    assert 6000 / (time.monotonic() - start) >= 500  # idle machine, two cores: 30,000
    assert pool.score([]) == []


def test_large_and_odd_strings_pass_through(pool: RewardPool) -> None:
    odd = "\0\u202e\ud800\n\r\u2028"
    requests = [
        RewardRequest("exact", "x" + odd + "x", "x" + odd + "x"),
        RewardRequest("exact", "a" * (1 << 20), "a" * (1 << 20)),
        RewardRequest("final_answer", "<think>" + odd * 200_000 + "</think>1", "1"),
        RewardRequest("final_answer", "<think></think>" + "(" * 5000, "1"),
    ]
    assert verdicts(pool, requests) == ["right", "right", "right", "unparsed"]


@pytest.mark.parametrize("hang", ["sleep", "hold the lock", "ignore"])
def test_a_hanging_scorer_costs_its_timeout_and_nothing_else(pool: RewardPool, hang: str) -> None:
    large = RewardRequest("exact", "a" * (1 << 18), "a" * (1 << 18))  # more than a pipe takes
    requests = [*easy(9), RewardRequest(BEHAVE, hang, ""), *[large] * 9, *easy(9)]
    expected = [*EASY_VERDICTS * 3, "timeout", *["right"] * 9, *EASY_VERDICTS * 3]
    start = time.monotonic()
    assert verdicts(pool, requests) == expected
    assert TIMEOUT <= time.monotonic() - start < TIMEOUT + 1.0
    assert verdicts(pool, easy(30)) == EASY_VERDICTS * 10


def test_hanging_scorers_hang_side_by_side(pool: RewardPool) -> None:
    assert behave(pool, "ok", "ok") == ["right"] * 2  # both workers are up
    start = time.monotonic()
    assert behave(pool, "sleep", "sleep") == ["timeout"] * 2
    assert time.monotonic() - start < 1.8 * TIMEOUT


def test_each_request_has_its_own_deadline(pool: RewardPool) -> None:
    assert behave(pool, *["nap"] * 6) == ["right"] * 6  # 0.9 s a worker, 0.3 s a request


def test_a_crash_fails_one_request(pool: RewardPool) -> None:
    expected = ["right", "crash", "right", "crash", "crash", "right", "crash", "right"]
    completions = ["ok", "exit", "ok", "raise", "none", "ok", "allocate", "ok"]
    assert behave(pool, *completions) == expected
    assert {result.reward for result in pool.score([RewardRequest(BEHAVE, "raise", "")])} == {0.0}


def test_a_scorer_that_forks_shifts_no_answers(pool: RewardPool) -> None:
    requests = [RewardRequest(BEHAVE, "fork", ""), *easy(30)]
    assert verdicts(pool, requests) == ["right", *EASY_VERDICTS * 10]


def test_first_error_of_a_kind_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    with RewardPool(num_workers=1, kinds=[BEHAVE]) as pool:
        assert behave(pool, *["raise"] * 5) == ["crash"] * 5
    (message,) = caplog.messages
    assert BEHAVE in message and "RuntimeError at user_scorers.py:" in message


def test_bad_requests_crash_by_themselves(pool: RewardPool) -> None:
    bad = [
        RewardRequest("nobody", "", ""),
        RewardRequest("user_scorers:length", "", ""),  # exists, but was not given to the pool
        RewardRequest("regex", "", "", {"pattern": object()}),
        RewardRequest("numeric", "", "", {"absolute": 10**5000}),
        RewardRequest("exact", None, ""),  # type: ignore[arg-type]
    ]
    assert verdicts(pool, [*bad, *easy(3)]) == ["crash"] * 5 + EASY_VERDICTS


def test_a_users_scorer_gets_metadata_and_may_return_any_number() -> None:
    kind = "user_scorers:length"
    with RewardPool(kinds=[kind, "final_answer"]) as pool:
        requests = [
            RewardRequest(kind, "abc", "", {"scale": 2.0, "gold": "x"}),
            RewardRequest(kind, "", ""),
        ]
        assert [(r.reward, r.verdict) for r in pool.score(requests)] == [
            (1.5, "right"),
            (0.0, "wrong"),
        ]


def test_our_kinds_are_sent_only_what_they_look_at() -> None:
    """A row's solution may be long, and what JSON has no form for is no matter of theirs."""
    row = {"solution": object(), "choices": ["a", "b"], "require_think": None}
    assert columns_of("multiple_choice", row, {"require_think": True}) == {
        "choices": ["a", "b"],
        "require_think": True,
    }
    assert columns_of("my_module:score", row, {"scale": 2}) == row | {"scale": 2}


def test_a_scorer_in_the_current_directory_is_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scorer_of_mine.py").write_text("def f(completion, gold): return 1\n")
    monkeypatch.chdir(tmp_path)
    with RewardPool(num_workers=1, kinds=["scorer_of_mine:f"]) as pool:
        assert verdicts(pool, [RewardRequest("scorer_of_mine:f", "", "")]) == ["right"]


def test_a_scorer_that_prints_and_reads_harms_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    kind = "user_scorers:prints"
    with RewardPool(num_workers=1, kinds=[kind]) as pool:
        assert verdicts(pool, [RewardRequest(kind, "", "")] * 3) == ["right"] * 3
    out, err = capfd.readouterr()
    assert out == "" and "a line" in err and "from a child" in err


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("nobody", "unknown reward kind 'nobody'"),
        ("no_such_module:f", "no_such_module:f cannot be imported: ModuleNotFoundError"),
        ("user_scorers:nothing", "user_scorers:nothing cannot be imported: AttributeError"),
        ("user_scorers:not_callable", "user_scorers:not_callable is a int, not a function"),
        ("user_scorers:swapped", "user_scorers:swapped takes gold first"),
        ("builtins:max", "reward function builtins:max does not say which parameters it has"),
        ("user_scorers:returns_none", "user_scorers:returns_none returned None"),
        ("user_scorers:returns_nan", "user_scorers:returns_nan returned nan"),
        ("user_scorers:raises", "user_scorers:raises fails .* no metadata: KeyError .* 'target'"),
        ("user_scorers:exits", "died on loading or probing user_scorers:exits"),
        ("user_scorers:needs_column", "no metadata: TypeError.* 'column'"),
    ],
)
def test_a_bad_scorer_is_an_error_at_the_start(kind: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason), RewardPool(1, kinds=["final_answer", kind]):
        pytest.fail("the pool opened")


def test_a_scorer_that_hangs_on_its_probe_is_an_error() -> None:
    probe = RewardRequest(BEHAVE, "sleep", "")
    pool = RewardPool(kinds=[BEHAVE], probes=[probe], start_seconds=1.0)
    with pytest.raises(UsageError, match=f"loading and probing {BEHAVE} took over 1 s"), pool:
        pytest.fail("the pool opened")


def test_a_probe_brings_the_metadata_a_scorer_needs() -> None:
    kind = "user_scorers:needs_column"
    probe = RewardRequest(kind, "", "a", {"column": "a"})
    with RewardPool(kinds=[kind], probes=[probe]) as pool:
        assert verdicts(pool, [probe, RewardRequest(kind, "", "a")]) == ["right", "crash"]


def test_a_probe_names_the_row_and_its_columns() -> None:
    kind = "user_scorers:two_columns"
    probe = RewardRequest(kind, "", "", {"source": "a", "level": 3}, "train.jsonl, row 7")
    message = f"{kind} fails on train.jsonl, row 7 with columns source, level: TypeError .*"
    message += "needs the column 'target'; the row's columns are: source, level"
    with pytest.raises(UsageError, match=message), RewardPool(1, kinds=[kind], probes=[probe]):
        pytest.fail("the pool opened")


def test_a_scorer_gets_the_columns_that_it_has_parameters_for() -> None:
    kind = "user_scorers:two_columns"
    rows = [{"target": "a"}, {"target": "a", "level": 3, "gold": "b"}, {"target": "b"}]
    rows += [{"target": "a", "source": "bad"}, {"level": 3}]
    requests = [RewardRequest(kind, "a", "", row) for row in rows]
    with RewardPool(kinds=[kind], probes=requests[:1]) as pool:
        assert verdicts(pool, requests) == ["right", "right", "wrong", "wrong", "crash"]


def test_options_stand_in_for_columns() -> None:
    kind = "user_scorers:two_columns"
    options = {kind: {"source": "bad"}, "numeric": {"absolute": 1}}
    requests = [
        RewardRequest(kind, "a", "", {"target": "a"}),
        RewardRequest(kind, "a", "", {"target": "a", "source": "good"}),
        RewardRequest("numeric", "42", "43"),
        RewardRequest("numeric", "42", "43", {"absolute": 0.5}),
        RewardRequest("numeric", "42", "43", {"absolute": None}),
    ]
    with RewardPool(kinds=[kind], probes=requests[:1], options=options) as pool:
        assert verdicts(pool, requests) == ["wrong", "right", "right", "wrong", "right"]
    with pytest.raises(UsageError, match="numeric has no option 'tolerance'"):
        RewardPool(options={"numeric": {"tolerance": 1}})


def test_a_gold_that_cannot_be_is_told_at_the_start() -> None:
    probe = RewardRequest("regex", "a", "(a", where="held_out, row 2")
    with (
        pytest.raises(
            UsageError, match="regex fails on held_out, row 2 .* unterminated subpattern"
        ),
        RewardPool(1, kinds=["regex"], probes=[probe]),
    ):
        pytest.fail("the pool opened")


def test_math_that_was_not_announced_is_loaded_when_it_is_asked_for() -> None:
    """The request meets its deadline, although importing sympy alone takes longer."""
    half = RewardRequest("math", "<think></think>\\boxed{\\frac{x}{2}}", "$x/2$")
    with RewardPool(timeout_seconds=TIMEOUT) as pool:
        assert verdicts(pool, [*easy(3), half]) == [*EASY_VERDICTS, "right"]


@pytest.mark.parametrize("first", [True, False])
def test_slow_requests_do_not_line_up(pool: RewardPool, first: bool) -> None:
    """Four in a row, which one worker takes in one go: two deadlines on two workers."""
    assert behave(pool, "ok", "ok") == ["right"] * 2
    slow = [RewardRequest(BEHAVE, "sleep", "")] * 4
    start = time.monotonic()
    results = verdicts(pool, [*slow, *easy(60)] if first else [*easy(60), *slow])
    assert time.monotonic() - start < 2 * TIMEOUT + 0.45
    assert results == (
        ["timeout"] * 4 + EASY_VERDICTS * 20 if first else EASY_VERDICTS * 20 + ["timeout"] * 4
    )


def test_a_lost_forker_is_replaced() -> None:
    """Nor is a worker that it forked blamed."""
    kind = "user_scorers:process_id"
    with RewardPool(num_workers=1, timeout_seconds=TIMEOUT, kinds=[kind, BEHAVE]) as pool:
        pid = int(pool.score([RewardRequest(kind, "", "")])[0].reward)
        forker = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(forker, signal.SIGKILL)
        assert until(lambda: not is_alive(forker), 2.0)
        assert verdicts(pool, easy(3)) == EASY_VERDICTS
        assert behave(pool, "sleep", "ok") == ["timeout", "right"]
        assert until(lambda: not is_alive(pid), 2.0)


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="0 workers"):
        RewardPool(num_workers=0)
    with pytest.raises(UsageError, match="-1 s"):
        RewardPool(timeout_seconds=-1)
    with pytest.raises(UsageError, match="type object is not JSON"):
        RewardPool(probes=[RewardRequest("regex", "", "", {"pattern": object()})])
    with pytest.raises(RuntimeError, match="open pool"):
        RewardPool().score([])


def test_workers_are_light() -> None:
    kind = "user_scorers:has_module"
    with RewardPool(num_workers=1, kinds=[kind]) as pool:
        modules = ["json", "jax", "numpy"]
        results = pool.score([RewardRequest(kind, "", module) for module in modules])
    assert [result.reward for result in results] == [1.0, 0.0, 0.0]


def test_workers_are_out_of_reach_of_ctrl_c_and_end_with_the_pool() -> None:
    kind = "user_scorers:process_id"
    with RewardPool(num_workers=1, kinds=[kind]) as pool:
        pid = int(pool.score([RewardRequest(kind, "", "")])[0].reward)
        assert is_alive(pid) and os.getpgid(pid) != os.getpgid(0)
        start = time.monotonic()
    assert not is_alive(pid) and time.monotonic() - start < 0.5


def test_a_worker_lost_between_two_calls_blames_nobody() -> None:
    kind = "user_scorers:process_id"
    with RewardPool(num_workers=1, kinds=[kind]) as pool:
        pid = int(pool.score([RewardRequest(kind, "", "")])[0].reward)
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: not is_alive(pid), 2.0)
        assert verdicts(pool, easy(3)) == EASY_VERDICTS


def test_an_interrupted_call_leaves_no_answers_to_the_next() -> None:
    with RewardPool(num_workers=1, kinds=[BEHAVE]) as pool:
        handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            behave(pool, "nap", "ok")
        signal.signal(signal.SIGALRM, handler)
        assert verdicts(pool, easy(1)) == ["wrong"]


def test_a_cancelled_call_ends_within_a_deadline() -> None:
    """The call is in a thread, as in use; twenty sleepers would take a worker ten seconds."""
    cancelled, errors = threading.Event(), []

    def score() -> None:
        try:
            pool.score([RewardRequest(BEHAVE, "sleep", "")] * 20, cancelled)
        except CancelledError as error:
            errors.append(str(error))

    with RewardPool(num_workers=1, timeout_seconds=TIMEOUT, kinds=[BEHAVE]) as pool:
        thread = threading.Thread(target=score)
        thread.start()
        time.sleep(0.1)
        start = time.monotonic()
        cancelled.set()
        thread.join()
        assert time.monotonic() - start < TIMEOUT + 0.3
        (error,) = errors
        assert "results are missing" in error
        assert verdicts(pool, easy(3)) == EASY_VERDICTS


PARENT = """
import sys
from srft_jax.rewards import RewardPool, RewardRequest
behave, process_id = "user_scorers:behave", "user_scorers:process_id"
with RewardPool(num_workers=1, timeout_seconds=1.0, kinds=[behave, process_id]) as pool:
    print(int(pool.score([RewardRequest(process_id, "", "")])[0].reward), flush=True)
    for completion in sys.argv[1:]:
        pool.score([RewardRequest(behave, completion, "")])
    sys.stdin.read()
"""


@pytest.mark.parametrize("at", [[], ["hold the lock"]])
def test_workers_end_when_the_parent_is_killed(at: list[str]) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert is_alive(pid)
        parent.kill()
    assert until(lambda: not is_alive(pid), 3.0)
