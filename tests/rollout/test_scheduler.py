"""Limits, stops, forced tokens, waves: what a request asks for is what it gets."""

import jax
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
    complete([Request([1], max_new_tokens=1)], segment=1)  # while this does, so the counts can grow
    assert decode._cache_size() > before[1]


def test_forced_tokens_are_included_and_flagged(free):
    """Beside a request without any, which they leave alone."""
    forced = [2, 7, 1, 8]
    groups = complete([Request(PROMPTS[0]), Request(PROMPTS[0], forced=forced)], temperature=0.0)
    (plain,), (led,) = groups
    assert (plain.num_forced, plain.tokens.tolist()) == (0, free[0])
    assert (led.num_forced, led.tokens[:4].tolist(), len(led.tokens)) == (4, forced, 16)
    logprobs, entropies, logits = trainer_view(PROMPTS[0], led.tokens)
    assert led.tokens[4:].tolist() == logits.argmax(-1)[4:].tolist()
    np.testing.assert_allclose(led.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(led.entropies, entropies, atol=1e-5)


def test_a_forced_stop_id_does_not_stop():
    stopped, unstopped = (
        complete_greedily(PROMPTS[:1], forced=[2, 7, 2, 1], stop_ids=stop)[0][0]
        for stop in ((7,), ())
    )
    end = next((i for i, t in enumerate(unstopped.tokens) if i > 3 and t == 7), 15)
    assert stopped.tokens.tolist() == unstopped.tokens.tolist()[: end + 1]
    assert len(stopped.tokens) > 4


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
    forced = [2, 7, 2, 1]
    request = Request(PROMPTS[0], forced=forced, stop_strings=(Letters().decode(forced),))
    completion = complete([request], temperature=0.0, tokenizer=Letters())[0][0]
    assert len(completion.tokens) > len(forced)


def test_a_prompt_is_prefilled_once_for_its_group(monkeypatch):
    """Prompts and rows are rounded up to multiples of 8, so the groups are larger than that."""
    seen = []

    class Enough(Exception):
        pass

    def spy(params, prompts, lengths, prompt_of_row, *args, **kwargs):
        seen.append((prompts.shape, prompt_of_row.tolist()))
        raise Enough

    monkeypatch.setattr(scheduler, "prefill", spy)
    with pytest.raises(Enough):
        complete([Request(PROMPTS[0], 16), Request(PROMPTS[2], 24)], slots=40)
    assert seen == [((8, 16), [0] * 16 + [1] * 24)]


def test_the_stream_yields_early_finishers_first(monkeypatch):
    calls = []

    def spy(*args, **kwargs):
        calls.append(None)
        return decode(*args, **kwargs)

    monkeypatch.setattr(scheduler, "decode", spy)
    requests = [Request(PROMPTS[0], 2), Request(PROMPTS[1], 2, max_new_tokens=3)]
    with jax.default_matmul_precision("highest"):
        stream = sample_stream(PARAMS, CONFIG, requests, KEY, sampling())
        order = [(c.request, c.member, len(calls)) for c in stream]
    assert order == [(1, 0, 1), (1, 1, 1), (0, 0, 2), (0, 1, 2)]


def test_completions_name_their_request_and_member_across_waves():
    requests = [Request(prompt, group_size=3) for prompt in PROMPTS]
    groups = complete(requests, slots=5)
    assert [[(c.request, c.member) for c in group] for group in groups] == [
        [(request, member) for member in range(3)] for request in range(4)
    ]


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
