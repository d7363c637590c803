"""Limits, stops, forced tokens, waves: what a request asks for is what it gets."""

import numpy as np
import pytest
from sampler_models import CONFIG, KEY, PARAMS, PROMPTS, complete, sampling, trainer_view

from srft_jax.rollout import Request, SamplingConfig, sample_stream, scheduler
from srft_jax.rollout.sampler import decode, prefill


class Letters:
    """Id 0 is `a`, id 1 is `b`, ..."""

    def decode(self, tokens):
        return "".join(chr(ord("a") + token) for token in tokens)


@pytest.fixture(scope="module")
def free():
    """What the prompts would say if nothing stopped them, greedily."""
    return [group[0].tokens.tolist() for group in complete_greedily(PROMPTS)]


def complete_greedily(prompts, **request):
    return complete([Request(prompt, **request) for prompt in prompts], temperature=0.0)


def first_new(tokens, start=2):
    """Position of the first token from `start` on that did not occur before."""
    return next(i for i in range(start, len(tokens)) if tokens[i] not in tokens[:i])


def test_a_stop_id_is_kept_and_finishes(free):
    for prompt, tokens in zip(PROMPTS, free, strict=True):
        end = first_new(tokens)
        stopped = complete_greedily([prompt], stop_ids=(tokens[end],))[0][0]
        assert stopped.tokens.tolist() == tokens[: end + 1]
        assert stopped.finished
        assert len(stopped.logprobs) == len(stopped.entropies) == end + 1


def test_without_a_stop_a_completion_is_cut_unfinished(free):
    for group, tokens in zip(complete_greedily(PROMPTS, max_new_tokens=5), free, strict=True):
        assert group[0].tokens.tolist() == tokens[:5]
        assert not group[0].finished
    assert all(len(tokens) == 16 for tokens in free)  # the sampling config's limit


def test_a_stop_id_on_the_last_allowed_token_finishes(free):
    end = first_new(free[0])
    request = dict(stop_ids=(free[0][end],), max_new_tokens=end + 1)
    assert complete_greedily(PROMPTS[:1], **request)[0][0].finished


def test_stop_ids_are_per_request(free):
    """Two requests for the same completion, that stop at different tokens."""
    first, second = first_new(free[0]), first_new(free[0], first_new(free[0]) + 1)
    requests = [Request(PROMPTS[0], stop_ids=(free[0][end],)) for end in (first, second)]
    groups = complete(requests, temperature=0.0)
    assert [len(group[0].tokens) for group in groups] == [first + 1, second + 1]


def test_other_stop_ids_limits_and_keys_compile_nothing(free):
    complete([Request(PROMPTS[0], stop_ids=(free[0][5],)), Request(PROMPTS[1], stop_ids=(1,))])
    before = (prefill._cache_size(), decode._cache_size())
    for stop in range(6):
        complete([Request(PROMPTS[2], stop_ids=(stop,), max_new_tokens=16 - stop), Request([1])])
    assert (prefill._cache_size(), decode._cache_size()) == before
    complete([Request(PROMPTS[0])], segment=7)  # while this does, so the counts can grow
    assert decode._cache_size() > before[1]


def test_forced_tokens_are_included_and_flagged():
    forced = [2, 7, 1, 8]
    plain, led = complete(
        [Request(PROMPTS[0], group_size=2), Request(PROMPTS[0], group_size=2, forced=forced)]
    )
    for completion in led:
        assert completion.tokens[:4].tolist() == forced
        assert (completion.num_forced, len(completion.tokens)) == (4, 16)
        logprobs, entropies, _ = trainer_view(PROMPTS[0], completion.tokens)
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
        np.testing.assert_allclose(completion.entropies, entropies, atol=1e-4)
    assert [c.num_forced for c in plain] == [0, 0]
    assert led[0].tokens.tolist() != led[1].tokens.tolist()


def test_a_forced_stop_id_does_not_stop():
    stopped, unstopped = (
        complete_greedily(PROMPTS[:1], forced=[2, 7, 2], stop_ids=stop)[0][0]
        for stop in ((7,), ())
    )
    end = next((i for i, t in enumerate(unstopped.tokens) if i > 2 and t == 7), 15)
    assert stopped.tokens.tolist() == unstopped.tokens.tolist()[: end + 1]
    assert len(stopped.tokens) > 3


@pytest.mark.parametrize("end", [3, 11])  # in the first and in the second segment
def test_a_stop_string_ends_with_the_token_that_completes_it(free, end):
    text = Letters().decode(free[0])
    stop = next(text[i : end + 1] for i in range(end, -1, -1) if text.find(text[i : end + 1]) == i)
    request = Request(PROMPTS[0], stop_strings=("never", stop))
    bystander = Request(PROMPTS[1])
    groups = complete([request, bystander], temperature=0.0, tokenizer=Letters())
    stopped, other = groups[0][0], groups[1][0]
    assert stopped.tokens.tolist() == free[0][: end + 1]
    assert stopped.finished and len(stopped.logprobs) == end + 1
    assert other.tokens.tolist() == free[1] and not other.finished


def test_a_stop_string_does_not_look_at_forced_tokens():
    forced = [2, 7, 2]
    request = Request(PROMPTS[0], forced=forced, stop_strings=(Letters().decode(forced),))
    completion = complete([request], temperature=0.0, tokenizer=Letters())[0][0]
    assert len(completion.tokens) > len(forced)


def test_a_prompt_is_prefilled_once_for_its_group(monkeypatch):
    seen = []

    def spy(params, prompts, lengths, prompt_of_row, *args, **kwargs):
        seen.append((prompts.shape, prompt_of_row.tolist()))
        return prefill(params, prompts, lengths, prompt_of_row, *args, **kwargs)

    monkeypatch.setattr(scheduler, "prefill", spy)
    groups = complete([Request(PROMPTS[0], 16), Request(PROMPTS[2], 24)], slots=40)
    assert [len(group) for group in groups] == [16, 24]
    assert seen == [((8, 16), [0] * 16 + [1] * 24)]


def test_the_stream_yields_early_finishers_first(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(None)
        return decode(*args, **kwargs)

    monkeypatch.setattr(scheduler, "decode", spy)
    requests = [Request(PROMPTS[0], 2), Request(PROMPTS[1], 2, max_new_tokens=3)]
    stream = sample_stream(PARAMS, CONFIG, requests, KEY, sampling())
    order = [(c.request, c.member, len(calls)) for c in stream]
    assert order == [(1, 0, 1), (1, 1, 1), (0, 0, 2), (0, 1, 2)]


def test_completions_name_their_request_and_member_across_waves():
    requests = [Request(prompt, group_size=3) for prompt in PROMPTS]
    stream = sample_stream(PARAMS, CONFIG, requests, KEY, sampling(slots=5))
    assert sorted((c.request, c.member) for c in stream) == [
        (request, member) for request in range(4) for member in range(3)
    ]
    groups = complete(requests, slots=5)
    assert [[c.member for c in group] for group in groups] == [[0, 1, 2]] * 4


def test_no_requests_give_no_completions():
    assert complete([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "request 1 has an empty prompt"),
        (Request([1], forced=[1] * 17), "request 1 may make 16 tokens but has 17 forced ones"),
        (Request([1], max_new_tokens=0), "request 1 may make 0 tokens"),
        (Request([1], stop_strings=("a",)), "request 1 has stop strings, which need a tokenizer"),
    ],
)
def test_bad_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        complete([Request([1]), request_])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=-0.1), "temperature -0.1 is below 0"),
        (dict(max_new_tokens=0), "max_new_tokens = 0 is below 1"),
        (dict(slots=0), "slots = 0 is below 1"),
        (dict(segment=0), "segment = 0 is below 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)
