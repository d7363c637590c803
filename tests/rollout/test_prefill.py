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

from srft_jax.rollout import Request, RolloutProgress, engine, packing, sample_stream

pytestmark = pytest.mark.usefixtures("quick_compilation")

FORCED = [2, 7, 1, 8]


@pytest.fixture
def prefilled(monkeypatch):
    """A list of the tokens of each prefilled prompt."""
    lengths = []

    def noted(jobs, **options):
        lengths.extend(len(job.prompt.tokens) for job in jobs)
        return packing.pack_prompts(jobs, **options)

    monkeypatch.setattr(engine, "pack_prompts", noted)
    return lengths


def test_a_prompt_is_run_once_for_all_requests_and_waves(prefilled):
    """Fourteen completions in eight rows; the first prompt is asked for twice."""
    requests = [
        Request(prompt, n)
        for prompt, n in zip((*PROMPTS, PROMPTS[0]), (2, 2, 4, 4, 2), strict=True)
    ]
    groups = complete(requests)
    assert sum(prefilled) == sum(map(len, PROMPTS)) == 18
    draws = {tuple(c.tokens) for group in groups for c in group}
    assert len(draws) == 14, "though each draws for itself"


def test_forced_tokens_are_prefilled_and_scored_as_the_trainer_does(prefilled):
    """Beside the same prompt without them, and with a group that shares them."""
    requests = [
        Request(PROMPTS[0]),
        Request(PROMPTS[0], 2, FORCED),
        Request(PROMPTS[2], 1, [4]),
        Request([20], 4, max_new_tokens=1),  # so that `complete_some` compiles nothing new
    ]
    (plain,), led, (short,), _ = complete(requests)
    assert (plain.num_forced, short.num_forced, [c.num_forced for c in led]) == (0, 1, [4, 4])
    assert led[0].sampled.tolist() == [False] * 4 + [True] * 12
    assert sorted(prefilled) == [1, 5, 5 + 4, 9 + 1]
    assert short.tokens[0] == 4 and led[0].tokens.tolist() != led[1].tokens.tolist()
    for prompt, completion in ((0, plain), (0, led[0]), (0, led[1]), (2, short)):
        assert len(completion.tokens) == 16
        logprobs, entropies, _ = trainer_view(PROMPTS[prompt], completion.tokens)
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
    for completion in led:
        assert completion.tokens[:4].tolist() == FORCED


def test_forced_tokens_take_no_decode_steps():
    seen: list[RolloutProgress] = []
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
