"""A sampler over several updates: what it keeps, what it lets in, what it frees."""

import contextlib
import dataclasses
import gc
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_models import (
    CONFIG,
    KEY,
    PARAMS,
    PROMPTS,
    assert_same,
    complete,
    in_groups,
    sampling,
    trainer_view,
)

from srft_jax.batch import prompt_key
from srft_jax.config import Truncation, UsageError
from srft_jax.host.compilations import Compilations
from srft_jax.rollout import Request, Sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")

OTHER_PARAMS = jax.tree.map(lambda x: 0.5 * x, PARAMS)
# Three completions in four rows: the first ends in the first segment, the others in the second.
FIRST = [
    Request(prompt, max_new_tokens=limit, group=group)
    for group, (prompt, limit) in enumerate(zip(PROMPTS[:3], (3, 16, 12), strict=True))
]
# One of them asks for a prompt that is in use.
LATER = [Request(PROMPTS[1], 3, group=3), Request(PROMPTS[3], 2, max_new_tokens=9, group=4)]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def sampler():
    made = Sampler(CONFIG, sampling())
    made.update(PARAMS)
    return made


def finished(sampler, requests, key=KEY, observer=None):
    """Trajectories by group."""
    sampler.submit(requests, key)
    return in_groups(sampler.stream(observer), len(requests))


def finished_with_later(sampler, when, first=FIRST, later=LATER, key=KEY):
    """Trajectories of both by group, and rows after each segment.

    Args:
        sampler: Idle.
        when: How many trajectories are seen before `later` is submitted.
        first: Requests of groups 0, 1, ...
        later: Requests of the groups after those.
        key: PRNG key of both.
    """
    rows, seen = [], []
    sampler.submit(first, key)
    for trajectory in sampler.stream(lambda _: rows.append(sampler.engine.sizes.rows)):
        seen.append(trajectory)
        if len(seen) == when:
            sampler.submit(later, key)
    return in_groups(seen, len(first) + len(later)), rows


@contextlib.contextmanager
def time_limit(seconds):
    """Raises where the block takes longer: what never ends would hang instead of fail."""

    def give_up(*_):
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_parameters_are_laid_out_once_for_each_update(sampler):
    requests, layouts = [Request(prompt, 4) for prompt in PROMPTS], []
    for version, params in enumerate((PARAMS, OTHER_PARAMS), start=3):
        sampler.update(params, version)
        layouts_here = []
        for _ in range(2):
            groups = finished(
                sampler,
                requests,
                observer=lambda _, here=layouts_here: here.append(sampler.engine.decode_params),
            )
            assert_same(groups, complete(requests, params=params))
            assert {trajectory.version for group in groups for trajectory in group} == {version}
        assert len(layouts_here) > 2 and all(one is layouts_here[0] for one in layouts_here)
        layouts.append(layouts_here[0])
    assert layouts[0] is not layouts[1]


def test_release_frees_parameters_and_their_layout(sampler):
    params = jax.tree.map(jnp.copy, PARAMS)
    references = [weakref.ref(params["embedding"])]
    sampler.update(params)
    del params
    finished(
        sampler,
        FIRST,
        observer=lambda _: references.append(
            weakref.ref(sampler.engine.decode_params["layers"][0]["down"])
        ),
    )
    gc.collect()
    assert all(reference() is not None for reference in references), "kept for the next requests"
    sampler.release()
    gc.collect()
    assert all(reference() is None for reference in references)
    sampler.submit(FIRST, KEY)
    with pytest.raises(RuntimeError, match="has no parameters: call update first"):
        next(sampler.stream())


def test_release_ends_a_stream_that_runs(sampler):
    sampler.submit(FIRST, KEY)
    seen = []
    for trajectory in sampler.stream():
        seen.append(trajectory)
        sampler.release()
    assert len(seen) == 1
    sampler.update(PARAMS)
    assert_same(finished(sampler, FIRST), complete(FIRST))


@pytest.mark.parametrize("before", [[], FIRST], ids=["", "after a submission"])
@pytest.mark.parametrize("after", [[], FIRST], ids=["", "before a submission"])
def test_release_by_the_observer_ends_the_stream(sampler, before, after):
    """In a segment that ends no completion. What is submitted before is forgotten with the rest;
    what comes after is for the next stream."""
    calls = []

    def observe(_):
        calls.append(len(calls))
        sampler.submit(before, KEY)
        sampler.release()
        if after:
            sampler.update(OTHER_PARAMS)
            sampler.submit(after, KEY)

    sampler.submit([Request(PROMPTS[0], max_new_tokens=16)], KEY)
    with time_limit(60):
        assert list(sampler.stream(observe)) == [] and calls == [0]
    assert sampler.engine is None
    if after:
        groups = in_groups(sampler.stream(), len(after))
        assert_same(groups, complete(after, params=OTHER_PARAMS))


@pytest.mark.parametrize("when", [1, 3], ids=["at the first", "at the last"])
def test_requests_submitted_while_others_run_draw_what_they_would_at_once(sampler, when):
    """Four rows become eight; running ones have tokens of their own in the cache by then."""
    groups, rows = finished_with_later(sampler, when)
    assert {*rows} == {4, 8} and rows == sorted(rows)
    assert_same(groups, complete([*FIRST, *LATER]))
    assert_same(finished(sampler, [*FIRST, *LATER]), groups)


@pytest.mark.slow
def test_rows_grow_while_a_long_completion_runs(sampler):
    """At its fourth segment, when its own part of the cache is in use."""
    first = [Request(PROMPTS[0], max_new_tokens=60), Request(PROMPTS[1], max_new_tokens=26)]
    later = [dataclasses.replace(request, group=request.group - 1) for request in LATER]
    groups, rows = finished_with_later(sampler, 1, first, later)
    assert rows[:4] == [2] * 4 and rows[-1] == 8
    assert_same(groups, complete([*first, *later]))


@pytest.mark.slow
def test_nothing_is_compiled_when_the_same_pattern_repeats():
    sampler = Sampler(CONFIG, sampling(segment=7))

    def repeat(number):
        """The pattern of `FIRST` and `LATER` with other prompts, draws and parameters."""
        sampler.update(jax.tree.map(lambda x: (1 + 0.1 * number) * x, PARAMS), number)
        first, later = (
            [
                dataclasses.replace(request, prompt=[(t + number) % 24 for t in request.prompt])
                for request in requests
            ]
            for requests in (FIRST, LATER)
        )
        for when in (1, 3):
            finished_with_later(sampler, when, first, later, jax.random.key(number))
        sampler.release()

    with Compilations() as compilations:
        repeat(0)
        assert compilations.since_last()[0]["perf/compilations"] > 5
        repeat(1)
        compilations.since_last()  # parameters of another kind of number
        repeat(2)
        repeat(3)
        assert compilations.since_last()[0]["perf/compilations"] == 0


@pytest.mark.parametrize(
    "truncation",
    [
        pytest.param(Truncation(), id="whole"),
        pytest.param(Truncation(top_k=12, top_p=0.9), id="truncated", marks=pytest.mark.slow),
    ],
)
def test_temperatures_side_by_side_equal_a_call_for_each(truncation):
    """Greedy, cool and warm requests, with forced tokens and without, for the same prompts."""
    temperatures = (0.0, 0.7, 1.3)
    requests = [
        Request(prompt, 2, forced, temperature=temperature)
        for temperature in temperatures
        for prompt, forced in ((PROMPTS[0], ()), (PROMPTS[1], (2, 7)))
    ]
    together = complete(requests, truncation=truncation)
    for number, temperature in enumerate(temperatures):
        alone = complete(
            [
                dataclasses.replace(requests[group], group=group, temperature=None)
                for group in (2 * number, 2 * number + 1)
            ],
            temperature=temperature,
            truncation=truncation,
        )
        assert_same(together[2 * number :][:2], alone)
        for group in together[2 * number :][:2]:
            request = requests[group[0].group]
            for trajectory in group:
                logprobs, entropies, _ = trainer_view(
                    request.prompt, trajectory.tokens, temperature or 1.0
                )
                np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=1e-5)
                np.testing.assert_allclose(trajectory.entropies, entropies, atol=1e-5)
    greedy, cool, warm = (together[2 * number] for number in range(3))
    assert greedy[0].tokens.tolist() == greedy[1].tokens.tolist()
    assert cool[0].tokens.tolist() != cool[1].tokens.tolist()
    assert cool[0].entropies[0] < warm[0].entropies[0] - 0.01


def test_an_update_while_completions_are_made_is_refused(sampler):
    sampler.submit(FIRST, KEY)
    refused = pytest.raises(RuntimeError, match="still completes requests by other parameters")
    with refused:
        sampler.update(OTHER_PARAMS, 1)
    for trajectory in sampler.stream():
        with refused:
            sampler.update(OTHER_PARAMS, 1)
        assert trajectory.version == 0
    sampler.update(OTHER_PARAMS, 1)
    assert_same(finished(sampler, FIRST), complete(FIRST, params=OTHER_PARAMS))


def test_leaving_a_stream_early_frees_everything(sampler):
    sampler.submit([*FIRST, *LATER], KEY)
    for _ in sampler.stream():
        cache = weakref.ref(sampler.engine.state.cache.prompt_values[0])
        assert cache() is not None
        break
    gc.collect()
    assert cache() is None and sampler.engine is None
    assert not sampler.table.some_wait and not sampler.table.running
    assert_same(finished(sampler, FIRST), complete(FIRST))
    sampler.update(OTHER_PARAMS)


def test_trajectories_carry_the_identity_of_their_prompt(sampler):
    """Forced tokens are no part of it."""
    groups = finished(
        sampler,
        [Request(PROMPTS[0], 2), Request(np.array(PROMPTS[0]), 1, [2]), Request(PROMPTS[1])],
    )
    keys = [{trajectory.key for trajectory in group} for group in groups]
    assert keys == [{prompt_key(PROMPTS[0])}] * 2 + [{prompt_key(PROMPTS[1])}]
    assert prompt_key(PROMPTS[0]) != prompt_key(PROMPTS[1])


@pytest.mark.slow
def test_a_group_may_come_in_several_requests():
    """Plain completions draw what they would beside a last plain one."""
    (whole,) = complete([Request(PROMPTS[0], 4, group=5)])
    plain, forced = complete(
        [
            Request(PROMPTS[0], 3, group=5),
            Request(PROMPTS[0], 1, forced=[2], group=5, first_member=3),
        ]
    )
    assert [(t.group, t.member) for t in (*plain, *forced)] == [(5, member) for member in range(4)]
    assert_same([plain], [whole[:3]])
    (last,) = complete([Request(PROMPTS[0], 1, group=5, first_member=3)])
    assert_same([last], [whole[3:]])
    assert whole[0].tokens.tolist() != whole[3].tokens.tolist()


def test_two_completions_of_one_name_are_refused():
    with pytest.raises(UsageError, match="2 completions are member 1 of group 0; requests of one"):
        complete([Request(PROMPTS[0], 2), Request(PROMPTS[1], group=0, first_member=1)])


@pytest.mark.slow
def test_a_prompt_asked_for_again_after_the_cache_has_shrunk(sampler):
    """A long prompt ends, a short one takes another's slot, the long prompt comes again."""
    long = Request(list(range(24)) * 8, 1, max_new_tokens=2, group=2)
    capacities, seen = [], []
    first = [Request(PROMPTS[0], 4, max_new_tokens=60), Request(PROMPTS[1], max_new_tokens=3), long]
    short = Request(PROMPTS[2], max_new_tokens=2, group=3)
    again = dataclasses.replace(long, group=4)
    note = lambda _: capacities.append(sampler.engine.state.cache.prompt_values[0].shape[2])  # noqa: E731
    sampler.submit(first, KEY)
    for trajectory in sampler.stream(note):
        seen.append(trajectory)
        if len(seen) == 2:
            sampler.submit([short], KEY)
        if trajectory.group == 3:
            sampler.submit([again], KEY)
    assert [
        capacity for i, capacity in enumerate(capacities) if capacity not in capacities[:i]
    ] == [
        192,
        32,
    ]
    assert capacities[-1] == 192
    assert_same(in_groups(seen, 5), complete([*first, short, again]))


def test_a_prompt_too_long_for_the_running_rows_waits_until_none_runs():
    """A MiB holds 8192 tokens: 16 rows beside short prompts, but not beside 16 of 600 tokens.

    Two rows end early in the third segment, which goes on: nobody may come in for them.
    """
    sampler, sizes = Sampler(CONFIG, sampling(slots=16, cache_mib=1)), []
    first = [Request([n], max_new_tokens=limit) for n, limit in enumerate([3, 18, 18] + [32] * 13)]
    later = [
        Request([4] * 600, max_new_tokens=3, group=16),
        Request([5, 6], max_new_tokens=9, group=17),
    ]

    def note(_):
        cache = sampler.engine.state.cache
        tokens = (*cache.prompt_keys, *cache.keys, *cache.recent_keys)
        assert 2 * sum(x.nbytes for x in tokens) <= 2**20
        sizes.append((sampler.engine.sizes.rows, sampler.engine.sizes.prompts))

    sampler.update(PARAMS)
    sampler.submit(first, KEY)
    seen = []
    for trajectory in sampler.stream(note):
        if not seen:
            sampler.submit(later, KEY)
        seen.append(trajectory)
    assert sizes == [(16, 16)] * 4 + [(2, 2)] * 2
    assert_same(in_groups(seen, 18), complete([*first, *later], slots=32))


def test_a_released_stream_leaves_the_next_one_alone(sampler):
    """The old generator is closed while the new one runs; two at a time are refused."""
    sampler.submit(FIRST, KEY)
    old = sampler.stream()
    next(old)
    sampler.release()
    sampler.update(PARAMS)
    sampler.submit(FIRST, KEY)
    new = sampler.stream()
    found = [next(new)]
    old.close()
    with pytest.raises(RuntimeError, match="a stream of this sampler is running already"):
        next(sampler.stream())
    found += new
    assert len(found) == len(FIRST)
