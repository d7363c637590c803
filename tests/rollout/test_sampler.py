"""What the sampler says of its completions is what the trainer will say of them."""

import jax
import numpy as np
import pytest
from sampler_models import CONFIG, KEY, PARAMS, PROMPTS, complete, trainer_view

from srft_jax.rollout import Request


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_are_the_trainers(temperature):
    """Four prompts of different lengths in a wave, hence padded; two completions each."""
    requests = [Request(prompt, group_size=2) for prompt in PROMPTS]
    groups = complete(requests, temperature=temperature)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            logprobs, entropies, _ = trainer_view(prompt, completion.tokens, temperature)
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
            np.testing.assert_allclose(completion.entropies, entropies, atol=1e-5)
            assert completion.logprobs.std() > 0.1 and completion.entropies.std() > 0.1


def test_temperature_changes_what_is_reported():
    """Otherwise the test above could pass with a temperature that nobody reads."""
    warm, cold = (complete([Request(PROMPTS[0])], temperature=t)[0][0] for t in (1.0, 0.7))
    assert cold.entropies[0] < warm.entropies[0] - 0.01


def test_greedy_is_the_argmax_of_the_forward_pass():
    for prompt, group in zip(
        PROMPTS, complete([Request(p) for p in PROMPTS], temperature=0.0), strict=True
    ):
        logprobs, _, logits = trainer_view(prompt, group[0].tokens)
        assert group[0].tokens.tolist() == logits.argmax(-1).tolist()
        np.testing.assert_allclose(group[0].logprobs, logprobs, atol=1e-5)


def test_prompts_of_different_lengths_complete_as_they_do_alone():
    """Beside one that makes all rows wider. Greedy: the key of a request's number plays no part."""
    long = list(range(1, 20))
    together = complete([Request(prompt) for prompt in (*PROMPTS, long)], temperature=0.0)
    for prompt, group in zip(PROMPTS, together, strict=False):
        alone = complete([Request(prompt)], temperature=0.0)[0][0]
        assert group[0].tokens.tolist() == alone.tokens.tolist()
        np.testing.assert_allclose(group[0].logprobs, alone.logprobs, atol=1e-5)


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


def test_keys_decide_completions():
    requests = [Request(prompt, group_size=2) for prompt in PROMPTS]

    def tokens(key):
        return [c.tokens.tolist() for group in complete(requests, key=key) for c in group]

    assert tokens(KEY) == tokens(KEY)
    other = tokens(jax.random.key(12))
    assert all(a != b for a, b in zip(tokens(KEY), other, strict=True))
    assert len({tuple(row) for row in other}) == len(other)  # members and requests differ


@pytest.mark.parametrize("changes", [dict(slots=3), dict(slots=64), dict(segment=11)])
def test_completions_do_not_depend_on_slots_and_segment(changes):
    requests = [Request(prompt, group_size=2, stop_ids=(4,)) for prompt in PROMPTS]
    assert_same(complete(requests), complete(requests, **changes))


def test_completions_do_not_depend_on_neighbours():
    """Request 1 among other prompts, group sizes, limits and stop ids."""
    mine = Request(PROMPTS[1], group_size=2, stop_ids=(4,))
    some = complete([Request(PROMPTS[0], 2), mine, Request(PROMPTS[2], 2)])
    others = complete([Request(PROMPTS[3], 3, max_new_tokens=2, stop_ids=(5,)), mine])
    assert_same([some[1]], [others[1]])


def test_params_are_an_argument():
    other = jax.tree.map(lambda x: 0.5 * x, PARAMS)
    mine, theirs = (
        complete([Request(PROMPTS[0])], params=params)[0][0].logprobs for params in (PARAMS, other)
    )
    assert np.abs(mine[0] - theirs[0]) > 1e-3


def assert_same(groups, others):
    flat, other_flat = ([c for group in g for c in group] for g in (groups, others))
    for one, other in zip(flat, other_flat, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.finished == other.finished
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=1e-5)
