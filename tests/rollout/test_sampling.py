"""One draw: its distribution, its extremes, and the statistics that go with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.rollout.sampling import draw

LOGITS = np.array([-np.inf, 1.0, 0.0, 2.0, -1.0, -np.inf], np.float32)
NONE_FORCED = -1


def draw_from(logits, uniform, temperature=1.0, forced=NONE_FORCED):
    """One draw a uniform, all from the same logits."""
    size = len(uniform)
    hidden = jnp.ones((size, 1), jnp.float32)
    return draw(
        hidden,
        jnp.asarray(logits)[None],
        jnp.asarray(uniform, jnp.float32),
        jnp.full(size, forced, jnp.int32),
        temperature,
    )


def softmax(logits, temperature):
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    return p / p.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_distributed_as_the_tempered_softmax(temperature):
    """A token's share of evenly spaced uniforms is its probability, up to their spacing."""
    num = 20_000
    drawn = draw_from(LOGITS, (np.arange(num) + 0.5) / num, temperature)
    shares = np.bincount(np.asarray(drawn.token), minlength=len(LOGITS)) / num
    np.testing.assert_allclose(shares, softmax(LOGITS, temperature), atol=2 / num)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_are_those_of_the_tempered_softmax(temperature):
    p = softmax(LOGITS, temperature)
    drawn = draw_from(LOGITS, [0.0, 0.3, 0.6, 0.9], temperature)
    np.testing.assert_allclose(drawn.logprob, np.log(p[np.asarray(drawn.token)]), rtol=1e-5)
    entropy = -sum(x * np.log(x) for x in p if x > 0)
    np.testing.assert_allclose(drawn.entropy, np.full(4, entropy), rtol=1e-5)


def test_extremes_draw_tokens_that_have_probability():
    """0 and the largest float32 that jax.random.uniform returns."""
    drawn = draw_from(LOGITS, [0.0, 1.0 - 2.0**-23])
    assert drawn.token.tolist() == [1, 4]
    wide = draw_from(np.zeros(5000, np.float32), [0.0, 1.0 - 2.0**-23])
    assert wide.token.tolist() == [0, 4999]


def test_temperature_zero_takes_the_likeliest_with_statistics_at_one():
    greedy, plain = draw_from(LOGITS, [0.9], 0.0), draw_from(LOGITS, [0.5], 1.0)
    assert greedy.token.tolist() == plain.token.tolist() == [3]
    np.testing.assert_array_equal(greedy.logprob, plain.logprob)
    np.testing.assert_array_equal(greedy.entropy, plain.entropy)


def test_a_forced_token_is_taken_with_its_own_log_prob():
    forced = draw_from(LOGITS, [0.5], forced=4)
    assert forced.token.tolist() == [4]
    np.testing.assert_allclose(forced.logprob, [np.log(softmax(LOGITS, 1.0)[4])], rtol=1e-5)


def test_statistics_are_float32_whatever_the_activations():
    hidden, head = jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 3), jnp.float32)
    drawn = jax.eval_shape(lambda: draw(hidden, head, jnp.zeros(1), jnp.full(1, NONE_FORCED), 1.0))
    assert (drawn.logprob.dtype, drawn.entropy.dtype) == (jnp.float32, jnp.float32)
