"""What is handed out when, what an observer is told, and what is compiled."""

import jax
import pytest
from sampler_models import CONFIG, KEY, PARAMS, PROMPTS, complete, complete_some, sampling

from srft_jax.rollout import Request, sample_stream
from srft_jax.rollout.engine import Engine

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stream(requests, observer=None, **changes):
    with jax.default_matmul_precision("highest"):
        yield from sample_stream(
            PARAMS, CONFIG, requests, KEY, sampling(**changes), observer=observer
        )


@pytest.mark.slow
def test_completions_are_handed_out_while_the_next_segment_runs(monkeypatch):
    events = []
    for name in ("prefill", "start", "finish"):

        def spy(*args, name=name, method=getattr(Engine, name)):
            events.append(name)
            return method(*args)

        monkeypatch.setattr(Engine, name, spy)
    groups, limits = (1, 2, 1, 4), (16, 3, 16, 11)
    requests = [
        Request(prompt, group_size, max_new_tokens=limit)
        for prompt, group_size, limit in zip(PROMPTS, groups, limits, strict=True)
    ]
    for completion in stream(requests):
        events.append((completion.group, completion.member))
    segment = ["prefill", "start"]
    assert events == [
        *segment,
        "finish",
        *segment,
        *[(1, 0), (1, 1)],
        "finish",
        *[(0, 0), (2, 0), *((3, i) for i in range(4))],
    ]


def progress_of(requests, **changes):
    seen = []
    for _ in stream(requests, seen.append, **changes):
        pass
    return [(p.finished, p.total, p.tokens, p.steps, p.occupancy) for p in seen], seen[-1]


@pytest.mark.slow
def test_progress_where_one_waits_for_a_row():
    """Two rows: 6 tokens beside 3, at whose end the third takes the row."""
    prompts = (PROMPTS[0], PROMPTS[1], PROMPTS[0])
    requests = [Request(p, 1, (), n) for p, n in zip(prompts, (3, 6, 3), strict=True)]
    numbers, last = progress_of(requests, slots=2)
    assert numbers == [(1, 3, 6, 3, 1.0), (3, 3, 12, 6, 1.0)]
    parts = (last.prefill_seconds, last.decode_seconds, last.host_seconds)
    assert all(x > 0 for x in parts) and last.seconds == sum(parts)


@pytest.mark.slow
def test_occupancy_counts_idle_rows_only_while_some_completion_waits():
    """Forced tokens fill both completions of the last request: its row draws nothing.

    3 steps of both rows, then 3 of one beside the first of those two, while the second waits.
    """
    requests = [Request(p, 1, (), n) for p, n in zip(PROMPTS, (6, 3), strict=False)]
    requests.append(Request(PROMPTS[2], 2, (1, 2), 2))
    numbers, _ = progress_of(requests, slots=2)
    assert numbers == [(1, 4, 6, 3, 1.0), (3, 4, 9, 6, 0.75), (4, 4, 9, 6, 0.75)]


def test_occupancy_is_one_where_nothing_waits():
    requests = [Request(p, 4 // n, (), n) for p, n in zip(PROMPTS, (1, 2, 4, 3), strict=True)]
    numbers, _ = progress_of(requests)
    assert numbers == [(8, 8, 4 + 2 * 2 + 4 + 3, 4, 1.0)]


@pytest.fixture
def compilations():
    """A list that grows by one entry a compilation."""
    found = []

    def note(event, _, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_call(compilations):
    """Other prompts and lengths of the same buckets, stop ids, limits and keys.

    At first all completions have rows; then half of them wait for one.
    """

    def call(prompts, groups, limits, stop_ids, seed):
        requests = [
            Request(prompt, group, (), limit, stop_ids)
            for prompt, group, limit in zip(prompts, groups, limits, strict=True)
        ]
        key = jax.random.key(seed)
        for _ in sample_stream(PARAMS, CONFIG, requests, key, sampling()):
            pass

    call(PROMPTS, (4, 1, 1, 2), (16, 9, 16, 16), (2, 3), seed=0)
    call(PROMPTS, (4, 4, 4, 4), (16, 9, 16, 9), (), seed=1)
    del compilations[:]
    others = ([1] * 7, [2] * 9, [3], [4] * 3)
    call(others, (2, 1, 1, 4), (9, 16, 15, 12), (7,), seed=2)
    call(others, (4, 4, 4, 4), (9, 16, 9, 16), (-7, -8), seed=3)
    assert not compilations
    complete_some([Request([1], 1, (), 1)], segment=3)
    assert compilations, "while this does compile"


@pytest.mark.slow
def test_a_prefill_is_compiled_once_however_long_the_others_are(compilations):
    """One row goes on for 150 tokens; in the other a new prompt begins after every 20."""
    requests = [Request([n] * 9, 1, (), 20) for n in range(1, 8)]
    complete([Request([8] * 9, 1, (), 150), *requests], slots=2, segment=19, max_new_tokens=150)
    assert compilations.count("jit(decode)") > 2, "one for each size of the cache"
    assert compilations.count("jit(prefill)") <= 1
