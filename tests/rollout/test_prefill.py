"""A prompt is run once, however many completions it has, beside others in one packed row."""

import numpy as np
import pytest
from sampler_models import (
    CONFIG,
    KEY,
    PARAMS,
    PROMPTS,
    complete,
    complete_some,
    sampling,
    trainer_view,
)

from srft_jax.rollout import Progress, Request, engine, sample_stream
from srft_jax.rollout import sampler as programs

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORCED = [2, 7, 1, 8]


@pytest.fixture
def prefilled(monkeypatch):
    """Packed prompts of every prefill."""
    seen = []

    def spy(params, prompts, packed, **kwargs):
        seen.append(packed)
        return programs.prefill(params, prompts, packed, **kwargs)

    monkeypatch.setattr(engine, "prefill", spy)
    return seen


def num_tokens(passes):
    return sum(int((packed.segment_ids > 0).sum()) for packed in passes)


def test_a_prompt_is_run_once_for_all_requests_and_waves(prefilled):
    """Fourteen completions in eight rows; the first prompt is asked for twice."""
    requests = [
        Request(prompt, n)
        for prompt, n in zip((*PROMPTS, PROMPTS[0]), (2, 2, 4, 4, 2), strict=True)
    ]
    groups = complete(requests)
    assert num_tokens(prefilled) == sum(map(len, PROMPTS)) == 18
    draws = {tuple(c.tokens) for group in groups for c in group}
    assert len(draws) == 14, "though each draws for itself"


def test_prompts_of_very_different_lengths_do_not_pad_to_the_longest(prefilled):
    prompts = [[1] * 60, *([i] * 2 for i in range(2, 24))]
    complete([Request(prompt, 1, (), 1) for prompt in prompts], slots=32)
    assert [packed.tokens.shape for packed in prefilled] == [(1, 64), (1, 64)]
    assert num_tokens(prefilled) == 60 + 44


def test_forced_tokens_are_prefilled_and_scored_as_the_trainer_does(prefilled):
    """Beside the same prompt without them, and with a group that shares them."""
    requests = [Request(PROMPTS[0]), Request(PROMPTS[0], 2, FORCED), Request(PROMPTS[2], 1, [4])]
    (plain,), led, (one,) = complete_some(requests)
    assert (plain.num_forced, one.num_forced, [c.num_forced for c in led]) == (0, 1, [4, 4])
    assert num_tokens(prefilled) == 5 + (5 + 4) + (9 + 1) + 1  # and the filler's one
    assert one.tokens[0] == 4 and led[0].tokens.tolist() != led[1].tokens.tolist()
    for prompt, completion in ((0, plain), (0, led[0]), (0, led[1]), (2, one)):
        assert len(completion.tokens) == 16
        logprobs, entropies, _ = trainer_view(PROMPTS[prompt], completion.tokens)
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
        np.testing.assert_array_equal(completion.drawn_logprobs, completion.logprobs)
    for completion in led:
        assert completion.tokens[:4].tolist() == FORCED


def test_forced_tokens_take_no_decode_steps():
    seen: list[Progress] = []
    requests = [Request(PROMPTS[0], 4, FORCED, 6), *(Request(p, 1, (), 2) for p in PROMPTS[1:])]
    groups = list(sample_stream(PARAMS, CONFIG, requests, KEY, sampling(), observer=seen.append))
    assert sorted(len(c.tokens) for c in groups) == [2] * 3 + [6] * 4
    assert (seen[-1].steps, seen[-1].tokens) == (2, 2 * 7)


def test_a_limit_of_the_forced_tokens_draws_nothing():
    done, other = complete_some([Request(PROMPTS[0], 2, FORCED, 4), Request(PROMPTS[1], 2)])
    for completion in done:
        assert completion.tokens.tolist() == FORCED and completion.num_forced == 4
        assert completion.truncated
        logprobs, entropies, _ = trainer_view(PROMPTS[0], FORCED)
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
    assert [len(c.tokens) for c in other] == [16, 16]


@pytest.mark.slow
def test_temperature_divides_the_logits_of_forced_tokens():
    (completion,) = complete_some([Request(PROMPTS[0], 1, FORCED, 6)], temperature=0.7)[0]
    logprobs, entropies, _ = trainer_view(PROMPTS[0], completion.tokens, 0.7)
    np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
    np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
