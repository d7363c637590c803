"""What the sampler says of its completions is what the trainer will say of them."""

import dataclasses

import jax
import numpy as np
import pytest
from sampler_models import (
    CONFIG,
    KEY,
    PARAMS,
    PROMPTS,
    assert_same,
    complete,
    complete_some,
    trainer_view,
)

from srft_jax.rollout import Request

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.7])
def test_log_probs_and_entropies_are_the_trainers(temperature):
    """Four prompts of different lengths in a wave, packed into a row; four completions each."""
    requests = [Request(prompt, group_size=4) for prompt in PROMPTS]
    groups = complete(requests, temperature=temperature)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            logprobs, entropies, _ = trainer_view(prompt, completion.tokens, temperature)
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
            np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
            assert completion.logprobs.std() > 0.1 and completion.entropies.std() > 0.1


def test_temperature_changes_what_is_reported():
    """Otherwise the test above could pass with a temperature that nobody reads."""
    warm, cold = (complete_some([Request(PROMPTS[0])], temperature=t)[0][0] for t in (1.0, 0.7))
    assert cold.entropies[0] < warm.entropies[0] - 0.01


def test_first_tokens_are_distributed_as_the_softmax():
    """Pearson's chi-square over 4096 rows; 49.7 is the 99.9% quantile for 23 degrees of freedom."""
    num, temperature = 4096, 0.7
    request = Request(PROMPTS[0], group_size=num, max_new_tokens=1)
    group = complete([request], temperature=temperature, slots=num, segment=1)[0]
    counts = np.bincount([c.tokens[0] for c in group], minlength=CONFIG.vocab_size)
    logits = trainer_view(PROMPTS[0], [0], temperature)[2][0].astype(np.float64) / temperature
    expected = num * np.exp(logits) / np.exp(logits).sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 49.7
    assert ((counts - num / CONFIG.vocab_size) ** 2 / (num / CONFIG.vocab_size)).sum() > 1000


@pytest.mark.slow
def test_a_key_of_another_kind_draws_independently_of_neighbours():
    """Under vmap, rbg's bits of a row depend on the others'."""
    key = jax.random.key(3, impl="rbg")
    requests = [Request(prompt, group_size=3) for prompt in PROMPTS]
    assert_same(complete(requests, key=key, slots=2), complete(requests, key=key, slots=16))


def test_keys_decide_completions():
    requests = [Request(prompt, group_size=4) for prompt in PROMPTS]

    def tokens(key):
        return [c.tokens.tolist() for group in complete(requests, key=key) for c in group]

    assert tokens(KEY) == tokens(KEY)
    other = tokens(jax.random.key(12))
    assert all(a != b for a, b in zip(tokens(KEY), other, strict=True))
    assert len({tuple(row) for row in other}) == len(other)  # members and requests differ


def test_completions_do_not_depend_on_slots_and_segment():
    requests = [Request(prompt, group_size=4, stop_ids=(4,)) for prompt in PROMPTS]
    assert_same(complete(requests), complete(requests, slots=3, segment=11))


def test_a_group_stands_for_the_index():
    """So that processes draw for their requests what one would draw for all."""
    last = Request(PROMPTS[-1], group_size=4)
    *_, expected = complete([*(Request(prompt) for prompt in PROMPTS[:-1]), last])
    (numbered,) = complete([dataclasses.replace(last, group=len(PROMPTS) - 1)])
    assert_same([numbered], [expected])
    assert complete([last])[0][0].tokens.tolist() != expected[0].tokens.tolist()


def test_params_are_an_argument():
    other = jax.tree.map(lambda x: 0.5 * x, PARAMS)
    mine, theirs = (
        complete_some([Request(PROMPTS[0])], params=params)[0][0].logprobs
        for params in (PARAMS, other)
    )
    assert np.abs(mine[0] - theirs[0]) > 1e-3
