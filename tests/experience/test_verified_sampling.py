"""Verdicts while others decode: the overlap, the order, and what happens when something breaks."""

import itertools
import signal
import threading
import time
from unittest import mock

import numpy as np
import pytest

from srft_jax.batch import Trajectory
from srft_jax.config import ShapingConfig
from srft_jax.data.encoding import EncodedExample
from srft_jax.data.examples import Example
from srft_jax.evaluation.scores import Evaluations, measure_pass_at_1
from srft_jax.experience import verified_sampling
from srft_jax.experience.scoring import Scorer
from srft_jax.experience.verified_sampling import BackgroundScorer, sample_verified
from srft_jax.rewards import RewardPool, RewardResult
from srft_jax.rollout import Request, RolloutProgress

LONG = 20.0  # seconds; what waits so long is stuck
DONE = RolloutProgress(6, 6, 12, 2, 0.5, 1.0, 2.0, 3.0)
SLOW = "slow_scorers:sleep"


class Tokenizer:
    """Ids as decimal numbers; keeps the threads that it was called from."""

    stop_ids, think_prefix = (0,), ""

    def __init__(self):
        self.threads = set()

    def decode(self, ids):
        self.threads.add(threading.current_thread())
        return " ".join(map(str, ids))


class Pool:
    """The reward is the first token. Keeps the texts of each call."""

    def __init__(self, first_call=lambda: None):
        self.calls = []
        self._first_call = first_call

    def score(self, requests, cancelled=None):
        self.calls.append([one.completion for one in requests])
        if len(self.calls) == 1:
            self._first_call()
        return [RewardResult(float(one.completion.split()[0]), "right") for one in requests]


def example(number=0, kind="exact"):
    return Example(prompt=f"{number}", answer=f"{number}", demonstrations=(), kind=kind)


def trajectory(group=0, member=0, first=None):
    values = np.zeros(2, np.float32)
    tokens = np.asarray([10 * group + member if first is None else first, 0])
    return Trajectory("", tokens, values == 0, values, values, 0, True, group, member)


class Streamed:
    """Stands in for the sampler: yields what it was made with."""

    def __init__(self, stream):
        self._stream = stream

    def submit(self, requests, key, slots=None):
        self.requests = requests

    def stream(self, observer):
        yield from self._stream
        observer(DONE)


def rollout(stream, pool, tokenizer=None, observer=None):
    """Verified rollouts of two groups of three completions each, sampled by `stream`."""
    requests = [Request([1], 3, group=0), Request([2], 3, group=1)]
    scorer = Scorer(pool, tokenizer or Tokenizer())
    examples = [example(0), example(1)]
    return sample_verified(Streamed(stream), requests, examples, None, scorer, observer)


ALL = [trajectory(group, member) for group in range(2) for member in range(3)]


def verifier_threads():
    return [one for one in threading.enumerate() if one.name.startswith("verifier")]


def test_verifying_begins_before_sampling_ends():
    """The rest is not sampled before the first completion is with the pool."""
    scored = threading.Event()

    def stream():
        yield ALL[0]
        assert scored.wait(LONG), "the first completion waits for the others"
        yield from ALL[1:]

    tokenizer = Tokenizer()
    rollout(stream(), Pool(scored.set), tokenizer)
    assert threading.main_thread() not in tokenizer.threads and len(tokenizer.threads) == 1


def test_sampling_goes_on_while_the_pool_is_busy():
    """What has piled up by then is scored in one call, so that all workers have some."""
    entered, sampled = threading.Event(), threading.Event()

    def first_call():
        entered.set()
        assert sampled.wait(LONG), "sampling waits for the pool"

    def stream():
        yield ALL[0]
        assert entered.wait(LONG)
        yield from ALL[1:]
        sampled.set()

    pool = Pool(first_call)
    rollout(stream(), pool)
    assert pool.calls == [["0 0"], ["1 0", "2 0", "10 0", "11 0", "12 0"]]


@pytest.mark.parametrize(("count", "shares"), [(1, [[0, 0, 1, 2, 2]]), (2, [[0, 0, 2, 2], [1]])])
def test_processes_take_turns_group_by_group(count, shares):
    """The first and the last group have two requests each."""
    requests = [Request([1], group=group) for group in (0, 0, 1, 2, 2)]
    for turn, share in enumerate(shares):
        here = verified_sampling.requests_here(requests, turn, count)
        assert [request.group for request in here] == share
        assert verified_sampling.requests_here([], turn, count) == []
        with pytest.raises(ValueError, match="request 1 does not say which example it answers"):
            verified_sampling.requests_here([requests[0], Request([1])], turn, count)


def test_the_order_is_that_of_requests():
    for order in itertools.islice(itertools.permutations(ALL), 0, 720, 97):
        found = rollout(order, Pool())
        places = [[(one.group, one.member) for one in group] for group in found.groups]
        assert places == [[(group, member) for member in range(3)] for group in range(2)]
        assert [[one.reward for one in group] for group in found.groups] == [
            [0.0, 1.0, 2.0],
            [10.0, 11.0, 12.0],
        ]


def test_reward_wait_is_what_follows_the_last_completion():
    def stream():
        yield from ALL
        time.sleep(0.3)  # the pool naps as long

    assert rollout(stream(), Pool(lambda: time.sleep(0.3))).reward_wait < 0.15
    assert rollout(ALL, Pool(lambda: time.sleep(0.3))).reward_wait > 0.15


def test_progress_is_passed_on_and_kept():
    seen = []
    assert rollout(ALL, Pool(), observer=seen.append).progress == DONE
    assert seen == [DONE]


def fail():
    raise OSError("no more processes")


def test_a_failure_ends_the_rollout_early():
    """Whoever wants the next completion verified hears of it."""
    sampled = []

    def stream():
        for one in itertools.islice(itertools.cycle(ALL), 2000):
            time.sleep(0.001)
            sampled.append(one)
            yield one

    with pytest.raises(OSError, match="no more processes"):
        rollout(stream(), Pool(fail))
    assert len(sampled) < 1000 and not verifier_threads()


def test_a_failure_in_the_end_is_not_lost():
    sampled = threading.Event()

    def first_call():
        sampled.wait(LONG)
        fail()

    def stream():
        yield from ALL
        sampled.set()

    with pytest.raises(OSError, match="no more processes"):
        rollout(stream(), Pool(first_call))


def test_a_pool_that_answers_too_little_is_a_failure():
    pool = Pool()
    pool.score = lambda requests, cancelled: []
    with pytest.raises(ValueError, match="shorter"):
        rollout(ALL, pool)


def test_a_failure_of_the_tokenizer_is_not_lost():
    with pytest.raises(TypeError, match="NoneType"):
        rollout(ALL, Pool(), mock.Mock(think_prefix=None, **{"decode.return_value": ""}))


def test_leaving_gives_up_what_waits():
    entered, released = threading.Event(), threading.Event()

    def first_call():
        entered.set()
        released.wait(LONG)

    pool = Pool(first_call)
    with BackgroundScorer(Scorer(pool, Tokenizer())) as verifier:
        verdicts = [verifier.submit(example(), ALL[0])]
        assert entered.wait(LONG)
        verdicts += [verifier.submit(example(), one) for one in ALL[1:]]
        threading.Timer(0.3, released.set).start()
    assert [one.cancelled() for one in verdicts] == [False] + [True] * 5
    assert len(pool.calls) == 1 and not verifier_threads()


def test_ctrl_c_does_not_wait_for_the_verdicts():
    """Forty sleepers on two workers would take ten seconds; it comes amid the second call."""
    sleepers = [trajectory(0, member, first=7) for member in range(40)]
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    with RewardPool(timeout_seconds=0.5, kinds=[SLOW]) as pool:
        start = time.monotonic()
        with (
            pytest.raises(KeyboardInterrupt),
            BackgroundScorer(Scorer(pool, Tokenizer())) as verifier,
        ):
            verdicts = [verifier.submit(example(kind=SLOW), one) for one in sleepers]
            signal.setitimer(signal.ITIMER_REAL, 0.8)
            verdicts[-1].result()
        assert time.monotonic() - start < 0.8 + 0.5 + 0.7
        assert not verifier_threads() and all(one.done() for one in verdicts)
        with BackgroundScorer(Scorer(pool, Tokenizer())) as verifier:  # the pool is free again
            scored = verifier.submit(example(kind=SLOW), ALL[1]).result(LONG)
        assert (scored.reward, scored.verdict) == (1.0, "right")
    signal.signal(signal.SIGALRM, handler)


def test_scores_are_those_of_their_sets():
    """Six problems are sampled from last to first; those from 10 up are right."""

    class LastFirst(Streamed):
        def submit(self, requests, key, slots=None):
            assert [(one.group_size, one.temperature) for one in requests] == [(1, 0.0)] * 6
            assert [one.prompt for one in requests] == [[number] for number in range(6)]
            assert {one.max_new_tokens for one in requests} == {9} and slots == 3

    def problems(numbers):
        return [EncodedExample(example(number), [number]) for number in numbers]

    sets = {"held_out": problems(range(4)), "none": problems([]), "ood": problems([4, 5])}
    seen = []
    shaped = Scorer(Pool(), Tokenizer(), [ShapingConfig("length", 1.0)], threshold=20.0)
    values, rows = measure_pass_at_1(
        LastFirst(trajectory(index, 0) for index in reversed(range(6))),
        Evaluations(sets, shaped, stop_ids=(0,), max_new_tokens=9, slots=3),
        seen.append,
    )
    assert values == {
        "eval/held_out/pass@1": 0.5,
        "eval/held_out/length": 2.0,
        "eval/ood/pass@1": 1.0,
        "eval/ood/length": 2.0,
    }
    assert [(row["set"], row["prompt"], row["reward"]) for row in rows] == [
        ("held_out" if n < 4 else "ood", str(n), 10.0 * n) for n in range(6)
    ]
    assert seen == [DONE]
