"""One draw: its distribution, its extremes, and the statistics that go with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from srft_jax.config import Truncation
from srft_jax.rollout import draw as drawing
from srft_jax.rollout.vocab_tiles import in_tiles, over_tiles, token_at

draw = jax.jit(drawing.draw_tokens, static_argnames=("truncation",))
LOGITS = np.array([-np.inf, 1.0, 0.0, 2.0, -1.0, 2.0, 0.5, -np.inf, 1.5, -2.0, 0.0], np.float32)
LAST_UNIFORM = 1.0 - 2.0**-23  # the largest that jax.random.uniform returns
LARGEST_BELOW_1 = 1.0 - 2.0**-24
OFF = Truncation()
TRUNCATIONS = [
    OFF,
    Truncation(top_k=3),
    Truncation(top_p=0.7),
    Truncation(min_p=0.3),
    Truncation(top_k=6, top_p=0.8, min_p=0.3),
]
ROWS = {
    "some": LOGITS,
    "ties": np.repeat([1.0, 3.0, 2.0], 7),
    "one-hot": np.where(np.arange(70) == 66, 0.0, -np.inf),
    "equal": np.zeros(37),
    "wide": np.linspace(0.0, 200.0, 40),
}


def truncated_softmax(logits, temperature, truncation):
    """Probabilities of one row, in float64, by sorting."""
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    if truncation.top_k:
        p[p < np.sort(p)[::-1][: truncation.top_k][-1]] = 0.0
    if truncation.top_p < 1.0:
        ordered = np.sort(p)[::-1]
        held_before = np.cumsum(ordered) - ordered
        p[p < ordered[held_before < truncation.top_p * p.sum()][-1]] = 0.0
    p[p < truncation.min_p * p.max()] = 0.0
    return p / p.sum()


def draw_from(logits, uniform, temperature=1.0, truncation=OFF):
    """One draw a uniform, all from the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(uniform), len(logits)))
    return draw(rows, jnp.asarray(uniform, jnp.float32), temperature, truncation)


def counts(drawn, vocab):
    return np.bincount(np.asarray(drawn.token), minlength=vocab)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_draws_are_distributed_as_the_truncated_softmax(row, truncation):
    """A token's share of evenly spaced uniforms is its probability, up to their spacing.

    log-prob and entropy are those of the whole softmax, whatever the truncation.
    """
    num, temperature, logits = 5_000, 0.7, np.full(70, -np.inf)
    # Rows of one length, so that one program serves all.
    logits[: len(ROWS[row])] = ROWS[row]
    drawn = draw_from(logits, (np.arange(num) + 0.5) / num, temperature, truncation)
    expected = truncated_softmax(logits, temperature, truncation)
    np.testing.assert_allclose(counts(drawn, len(logits)) / num, expected, atol=2 / num)
    token, whole = np.asarray(drawn.token), truncated_softmax(logits, temperature, OFF)
    np.testing.assert_allclose(drawn.logprob, np.log(whole[token]), rtol=1e-5, atol=1e-6)
    entropy = np.full(num, -sum(x * np.log(x) for x in whole if x > 0))
    np.testing.assert_allclose(drawn.entropy, entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [(0.5, OFF), (2.0, OFF), *((1.0, truncation) for truncation in TRUNCATIONS)],
    ids=str,
)
def test_sampled_frequencies_pass_a_chi_square_test(temperature, truncation):
    num = 20_000
    uniform = jax.random.uniform(jax.random.key(3), (num,))
    drawn = draw_from(LOGITS, uniform, temperature, truncation)
    expected = num * truncated_softmax(LOGITS, temperature, truncation)
    observed, possible = counts(drawn, len(LOGITS)), expected > 0
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible], expected[possible]).pvalue > 0.001


@pytest.mark.parametrize("truncation", TRUNCATIONS[1:], ids=str)
def test_under_truncation_the_log_prob_is_that_of_the_whole_tempered_distribution(truncation):
    """Whichever token is drawn has more in what the truncation leaves."""
    drawn = draw_from(LOGITS, [0.1, 0.9], 0.7, truncation)
    token = np.asarray(drawn.token)
    whole, left = (truncated_softmax(LOGITS, 0.7, how)[token] for how in (OFF, truncation))
    np.testing.assert_allclose(drawn.logprob, np.log(whole), rtol=1e-6)
    assert (left > 1.05 * whole).all()


@pytest.mark.parametrize("vocab", [11, 5_000, pytest.param(151_936, marks=pytest.mark.slow)])
@pytest.mark.parametrize("truncation", [OFF, Truncation(top_p=0.9), Truncation(top_k=40)], ids=str)
def test_extremes_draw_tokens_that_have_probability(vocab, truncation):
    """Half of the tokens are masked, among them the first and the last."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=vocab).astype(np.float32)
    logits[rng.permutation(vocab)[: vocab // 2]] = -np.inf
    logits[[0, -1]] = -np.inf
    expected = truncated_softmax(logits, 1.0, truncation)
    uniform = [0.0, LAST_UNIFORM, LARGEST_BELOW_1, *rng.random(30)]
    drawn = draw_from(logits, uniform, truncation=truncation)
    assert (expected[np.asarray(drawn.token)] > 0).all()
    assert len(set(drawn.token.tolist())) > 2


def test_uniforms_at_the_edge_of_a_tile_draw_a_positive_weight():
    """By rounding, such a uniform may point before the first weight of the tile, which is 0."""
    weights = np.random.default_rng(0).random((100, 1_000)).astype(np.float32)
    tiles = in_tiles(jnp.asarray(weights), 0.0).at[:, ::2].set(0.0)
    sums = over_tiles(jnp.add, jnp.abs, tiles)
    edges = jnp.cumsum(sums, axis=1) / jnp.sum(sums, axis=1, keepdims=True)
    draw_token = jax.jit(token_at, static_argnums=3)
    for uniform in edges[:, :-1].T:
        token = draw_token(tiles, sums, uniform, jnp.abs)
        assert (jnp.take_along_axis(tiles.reshape(100, -1), token[:, None], axis=1) > 0).all()


def test_a_draw_depends_on_its_own_row_alone():
    """Neighbours take the search for the threshold a different number of passes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(32, 700)) * np.geomspace(0.01, 30, 32)[:, None]
    logits, uniform = jnp.asarray(logits, jnp.float32), jnp.asarray(rng.random(32), jnp.float32)
    together = draw(logits, uniform, 1.0, Truncation(top_k=300, top_p=0.9))
    for row in range(0, 32, 5):
        alone = draw(logits[row : row + 1], uniform[row : row + 1], 1.0, Truncation(300, 0.9))
        assert alone.token == together.token[row]
        np.testing.assert_allclose(alone.logprob, together.logprob[row], rtol=1e-6)


@pytest.mark.parametrize("truncation", [OFF, Truncation(top_k=2)], ids=str)
def test_temperature_zero_takes_the_likeliest_with_statistics_at_one(truncation):
    """The first of the likeliest, as argmax does."""
    greedy, plain = draw_from(LOGITS, [0.9], 0.0, truncation), draw_from(LOGITS, [0.0], 1.0)
    assert greedy.token.tolist() == [np.argmax(LOGITS)] == [3]
    likeliest = np.log(truncated_softmax(LOGITS, 1.0, OFF).max())
    np.testing.assert_allclose(greedy.logprob, [likeliest], rtol=1e-6)
    np.testing.assert_array_equal(greedy.entropy, plain.entropy)


@pytest.mark.parametrize("truncation", [OFF, Truncation(top_p=0.8)], ids=str)
def test_rows_of_several_temperatures_draw_what_each_draws_among_its_like(truncation):
    """Two of four rows are greedy; other calls in which all rows have one temperature."""
    temperatures = jnp.array([0.0, 0.7, 0.0, 1.3])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 700)), jnp.float32)
    uniform = jnp.array([0.9, 0.3, 0.1, 0.6])
    mixed = draw(logits, uniform, temperatures, truncation)
    for row, temperature in enumerate(temperatures):
        alike = draw(logits, uniform, temperature, truncation)
        for value, other in zip(mixed, alike, strict=True):
            assert value[row] == other[row]


def test_statistics_are_float32_whatever_the_logits():
    logits = jnp.ones((1, 3), jnp.bfloat16)
    drawn = jax.eval_shape(lambda: draw(logits, jnp.zeros(1), 1.0, Truncation(top_p=0.5)))
    assert [x.dtype for x in drawn] == [jnp.int32, jnp.float32, jnp.float32]


def test_nothing_is_sorted_or_scattered():
    def jaxpr(function):
        return str(jax.make_jaxpr(function)(jnp.zeros((2, 300))))

    drawn = jaxpr(lambda z: draw(z, jnp.zeros(2), 1.0, Truncation(10, 0.9, 0.1)))
    assert "sort[" in jaxpr(jnp.sort)
    assert "top_k[" in jaxpr(lambda z: jax.lax.top_k(z, 3))
    assert "while[" in drawn
    assert not any(name in drawn for name in ("sort[", "top_k[", "scatter"))
