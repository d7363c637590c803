"""Limits, stops, forced tokens, waves: what a request asks for is what it gets."""

import pytest
from sampler_models import PROMPTS, complete, complete_some, greedy

from srft_jax.rollout import Request, SamplingConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Letters:
    """Id 0 is `a`, id 1 is `b`, ..."""

    def decode(self, tokens):
        return "".join(chr(ord("a") + token) for token in tokens)


@pytest.fixture(scope="module")
def free():
    """What the prompts would say if nothing stopped them, greedily."""
    return [completion.tokens.tolist() for completion in greedy(PROMPTS)]


def first_new(tokens, start=2):
    """Position of the first token from `start` on that did not occur before."""
    return next(i for i in range(start, len(tokens)) if tokens[i] not in tokens[:i])


def test_a_stop_id_is_kept_and_finishes(free):
    for prompt, tokens in zip(PROMPTS, free, strict=True):
        end = first_new(tokens)
        stopped = greedy([prompt], stop_ids=(tokens[end],))[0]
        assert stopped.tokens.tolist() == tokens[: end + 1]
        assert stopped.finished
        assert len(stopped.logprobs) == len(stopped.entropies) == end + 1


def test_without_a_stop_a_completion_is_cut_unfinished(free):
    for completion, tokens in zip(greedy(PROMPTS, max_new_tokens=5), free, strict=True):
        assert completion.tokens.tolist() == tokens[:5]
        assert completion.truncated and not completion.finished
    assert all(len(tokens) == 16 for tokens in free)  # the sampling config's limit


def test_a_stop_id_on_the_last_allowed_token_finishes(free):
    end = first_new(free[0])
    request = dict(stop_ids=(free[0][end],), max_new_tokens=end + 1)
    assert greedy(PROMPTS[:1], **request)[0].finished


def test_stop_ids_are_per_request(free):
    """Two requests for the same completion, that stop at different tokens."""
    first, second = first_new(free[0]), first_new(free[0], first_new(free[0]) + 1)
    requests = [Request(PROMPTS[0], stop_ids=(free[0][end],)) for end in (first, second)]
    groups = complete_some(requests, temperature=0.0)
    assert [len(group[0].tokens) for group in groups] == [first + 1, second + 1]


def test_a_limit_of_one_is_one_token(free):
    for completion, tokens in zip(greedy(PROMPTS, max_new_tokens=1), free, strict=True):
        assert completion.tokens.tolist() == tokens[:1]
        assert completion.truncated


def test_a_forced_stop_id_does_not_stop():
    stopped, unstopped = (
        greedy(PROMPTS[:1], forced=[2, 7, 2, 1], stop_ids=stop)[0] for stop in ((7,), ())
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
    groups = complete_some([request, bystander], temperature=0.0, tokenizer=Letters())
    stopped, other = groups[0][0], groups[1][0]
    assert stopped.tokens.tolist() == free[0][: end + 1]
    assert stopped.finished and len(stopped.logprobs) == end + 1
    assert other.tokens.tolist() == free[1] and not other.finished


def test_a_stop_string_does_not_look_at_forced_tokens():
    forced = [2, 7, 2, 1]
    request = Request(PROMPTS[0], forced=forced, stop_strings=(Letters().decode(forced),))
    completion = complete_some([request], temperature=0.0, tokenizer=Letters())[0][0]
    assert len(completion.tokens) > len(forced)


def test_completions_name_their_group_and_member_across_waves():
    requests = [Request(prompt, group_size=3) for prompt in PROMPTS]
    groups = complete(requests, slots=5)
    assert [[(c.group, c.member) for c in group] for group in groups] == [
        [(group, member) for member in range(3)] for group in range(4)
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
        (dict(temperature=-0.1), "temperature -0.1 is not 0 or more"),
        (dict(max_new_tokens=0), "max_new_tokens = 0 is below 1"),
        (dict(slots=0), "slots = 0 is below 1"),
        (dict(segment=0), "segment = 0 is below 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)
