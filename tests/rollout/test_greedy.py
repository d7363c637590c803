"""Greedy completions against a loop that runs the whole sequence for every token."""

import numpy as np
import pytest
from sampler_models import (
    CONFIG,
    PROMPTS,
    TWO_LAYERS,
    UNTIED,
    argmax_loop,
    assert_same,
    complete,
    complete_some,
    random_params,
    watched,
)

from srft_jax.rollout import Request

pytestmark = pytest.mark.usefixtures("quick_compilation")

LONG = list(np.random.default_rng(0).integers(0, CONFIG.vocab_size, 33))  # its bucket is 64


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TWO_LAYERS, id="tied"),
        pytest.param(UNTIED, marks=pytest.mark.slow, id="untied"),
    ],
)
def test_greedy_equals_a_loop_of_whole_forward_passes(config):
    """Two layers, grouped heads, odd lengths, and four rows for ten completions of five prompts."""
    params, limits, groups = random_params(config), (13, 7, 5, 21, 11), (2, 3, 1, 1, 3)
    prompts = (*PROMPTS, LONG)
    requests = [
        Request(prompt, group_size, max_new_tokens=limit)
        for prompt, group_size, limit in zip(prompts, groups, limits, strict=True)
    ]

    def counts_and_waiting(sampler):
        return [row.count for row in sampler.table.running], sampler.table.some_wait

    completed, segments = watched(
        requests, counts_and_waiting, params=params, config=config, temperature=0.0, slots=4
    )
    for prompt, limit, group in zip(prompts, limits, completed, strict=True):
        expected = argmax_loop(prompt, limit, params=params, config=config)
        assert len(set(expected)) > 2, "the policy does not repeat itself"
        assert [c.tokens.tolist() for c in group] == [expected] * len(group)
    # Some row took a completion while another was in the midst of one.
    assert any(0 < len(counts) < 4 and waiting for counts, waiting in segments)


def test_permuting_requests_permutes_greedy_results():
    """Also limits, which decide who starts first."""
    requests = [Request(p, 4, (), n) for p, n in zip(PROMPTS, (3, 16, 9, 12), strict=True)]
    order = [2, 0, 3, 1]
    plain = complete(requests, temperature=0.0)
    permuted = complete([requests[i] for i in order], temperature=0.0)
    assert_same([plain[i] for i in order], permuted)
    assert [[c.group for c in group] for group in permuted] == [[i] * 4 for i in range(4)]


def test_a_draw_goes_by_the_number_of_its_request():
    """Requests for one prompt: a limit changes who starts first, not what is drawn."""
    one, other = (
        complete_some([Request(PROMPTS[0], 1, (), limit) for limit in limits])
        for limits in ((16, 5), (5, 16))
    )
    for (long,), (short,) in ((one[0], other[0]), (other[1], one[1])):
        assert long.tokens[:5].tolist() == short.tokens.tolist()
    assert one[0][0].tokens.tolist() != other[1][0].tokens.tolist()


def test_the_prompt_of_another_request_changes_nothing():
    mine = Request(PROMPTS[1], 2)
    some = complete_some([Request(PROMPTS[0], 2), mine, Request(PROMPTS[2], 2)])
    others = complete_some([Request(PROMPTS[2], 2), mine, Request(PROMPTS[0], 2)])
    assert_same([some[1]], [others[1]])
