"""Attention to a cache in parts against one softmax over all that a row may see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.batch import KVCache
from srft_jax.ops.attention import ScoreOptions
from srft_jax.ops.decode_attention import decode_attention

HEADS, KV_HEADS, H = 4, 2, 6
PROMPT_LENGTHS = [5, 1, 7]
LENGTHS = [3, 0, 6, 1, 2]  # own tokens of each row
LANES = [(0, 0), (2, 1), (0, 1), (1, 0), (2, 0)]  # prompt and lane of each row
NUM_RECENT = 2  # before the token at hand
UNSEEN = 1e4  # stands where no row may look

OPTIONS = ScoreOptions(H**-0.5)
jit_attend = jax.jit(decode_attention, static_argnums=(2, 3, 4))


def attend(query, cache, layer, options=OPTIONS, window=None):
    return jit_attend(query, cache, layer, options, window)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def problem(lengths=LENGTHS, lanes=LANES, capacity=8, seed=0):
    """A query for each row, and a cache of one layer."""
    rng = np.random.default_rng(seed)

    def part(rows, lengths, size):
        """Keys with tokens in the last axis, and values."""
        keys, values = rng.normal(size=(2, rows, KV_HEADS, size, H)).astype(np.float32)
        unseen = np.arange(size) >= np.reshape(lengths, (-1, 1))
        keys, values = (np.where(unseen[:, None, :, None], UNSEEN, x) for x in (keys, values))
        return (jnp.asarray(keys.swapaxes(2, 3)),), (jnp.asarray(values),)

    num_rows, num_prompts, num_lanes = len(lanes), len(PROMPT_LENGTHS), 3
    row_of_lane = np.full((num_prompts, num_lanes), num_rows - 1)  # an empty lane has any row
    for row, (prompt, lane) in enumerate(lanes):
        row_of_lane[prompt, lane] = row
    prompt_keys, prompt_values = part(num_prompts, PROMPT_LENGTHS, 8)
    keys, values = part(num_rows, lengths, capacity)
    recent_keys, recent_values = part(num_rows, [NUM_RECENT + 1] * num_rows, 4)
    cache = KVCache(
        prompt_keys,
        prompt_values,
        keys,
        values,
        recent_keys,
        recent_values,
        prompt_lengths=jnp.array(PROMPT_LENGTHS),
        lengths=jnp.array(lengths),
        num_recent=jnp.int32(NUM_RECENT),
        row_of_lane=jnp.asarray(row_of_lane),
        lane_of_row=jnp.array([prompt * num_lanes + lane for prompt, lane in lanes]),
    )
    query = rng.normal(size=(num_rows, HEADS, H)).astype(np.float32)
    return jnp.asarray(query), cache


def one_softmax(query, cache, options=OPTIONS, window=None):
    """Attention in float64, one head of one row at a time, over its tokens in their order."""
    cache = jax.tree.map(lambda x: np.asarray(x, np.float64), cache)
    query, out = np.asarray(query, np.float64), np.zeros(query.shape)
    for row, head in np.ndindex(query.shape[:2]):
        prompt = int(cache.lane_of_row[row]) // cache.row_of_lane.shape[1]
        kv_head = head // (HEADS // KV_HEADS)
        parts = [
            (
                cache.prompt_keys[0][prompt],
                cache.prompt_values[0][prompt],
                cache.prompt_lengths[prompt],
            ),
            (cache.keys[0][row], cache.values[0][row], cache.lengths[row]),
            (cache.recent_keys[0][row], cache.recent_values[0][row], cache.num_recent + 1),
        ]
        seen = [(k[kv_head].T[: int(n)], v[kv_head][: int(n)]) for k, v, n in parts]
        keys, values = (np.concatenate(arrays) for arrays in zip(*seen, strict=True))
        keys, values = keys[-(window or 0) :], values[-(window or 0) :]
        scores = keys @ query[row, head] * options.scale
        if options.softcap:
            scores = options.softcap * np.tanh(scores / options.softcap)
        weights = np.exp(scores - scores.max())
        out[row, head] = weights @ values / weights.sum()
    return out


def test_parts_are_merged_as_one_softmax():
    query, cache = problem()
    np.testing.assert_allclose(attend(query, cache, 0), one_softmax(query, cache), atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 7, 10, 100])
def test_windows_and_caps(window):
    """Windows that end in each of the parts, in different parts for different rows."""
    query, cache = problem()
    options = ScoreOptions(0.9, 0.7)
    got = attend(query, cache, 0, options, window)
    np.testing.assert_allclose(got, one_softmax(query, cache, options, window), atol=1e-5)


@pytest.mark.parametrize("part", ["prompt_keys", "keys", "recent_keys"])
@pytest.mark.parametrize("factor", [-60.0, 60.0])
def test_parts_whose_scores_lie_far_apart_are_merged_as_well(part, factor):
    """exp of such scores overflows, or is 0, in float32."""
    query, cache = problem()
    keys = getattr(cache, part)[0]
    cache = dataclasses.replace(cache, **{part: (jnp.where(keys < UNSEEN, factor * keys, keys),)})
    got, want = attend(query, cache, 0), one_softmax(query, cache)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_an_own_part_without_room():
    query, cache = problem(lengths=[0] * 5, capacity=0)
    np.testing.assert_allclose(attend(query, cache, 0), one_softmax(query, cache), atol=1e-5)


def test_a_row_attends_to_its_prompt_in_whatever_lane():
    """The rows of each prompt change their lanes."""
    query, cache = problem()
    rows, lanes = np.array([0, 2, 1, 4, 3]), [(0, 2), (2, 2), (0, 0), (1, 1), (2, 1)]
    _, other = problem(lanes=lanes)
    np.testing.assert_allclose(attend(query, other, 0), attend(query, cache, 0), atol=1e-6)
    # What lane_of_row says counts: a row on another prompt gives something else.
    moved = dataclasses.replace(cache, lane_of_row=cache.lane_of_row[rows])
    moved = dataclasses.replace(moved, row_of_lane=jnp.asarray([[0, 1, 0], [4, 4, 4], [3, 2, 0]]))
    difference = np.abs(attend(query, moved, 0) - attend(query, cache, 0)).max(axis=(1, 2))
    assert (difference > 1e-3).tolist() == [False, True, True, True, True]


def test_idle_rows_give_numbers_and_disturb_nobody():
    """An idle row names any lane, also an empty one, which holds a row of very different scores.

    Nobody reads an idle row's output, but a NaN would stay in its keys and reach the next row.
    """
    query, cache = problem()
    loud = cache.prompt_keys[0].at[1].multiply(1e3)  # weights of other rows overflow beside it
    idle = dataclasses.replace(
        cache,
        prompt_keys=(loud,),
        lengths=cache.lengths.at[3].set(0),
        lane_of_row=cache.lane_of_row.at[3].set(4),
        row_of_lane=cache.row_of_lane.at[1].set(0),
    )
    before, after = np.asarray(attend(query, cache, 0)), np.asarray(attend(query, idle, 0))
    assert np.isfinite(after).all()
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(after[others], before[others])
    no_prompt = dataclasses.replace(idle, prompt_lengths=cache.prompt_lengths.at[1].set(0))
    np.testing.assert_array_equal(attend(query, no_prompt, 0)[np.array(others)], before[others])
    assert np.isfinite(attend(query, no_prompt, 0)).all()


def test_an_idle_row_in_the_lane_of_another_gives_numbers():
    """The lane's row gives the prompt no weight, the idle row gives all weight to the prompt.

    So all weights that reach the idle row are 0.
    """
    query, cache = problem()
    direction = query.reshape(5, KV_HEADS, -1, H).sum(axis=2)[..., None]  # [R, K, H, 1]
    own, recent = (
        jnp.where(x < UNSEEN, sign * 300 * direction, x)
        for x, sign in ((cache.keys[0], 1), (cache.recent_keys[0], -1))
    )
    idle = dataclasses.replace(
        cache,
        keys=(cache.keys[0].at[0].set(own[0]),),
        recent_keys=(cache.recent_keys[0].at[3].set(recent[3]),),
        lengths=cache.lengths.at[3].set(0),
        lane_of_row=cache.lane_of_row.at[3].set(0),
    )
    assert np.isfinite(attend(query, idle, 0)).all()


def test_each_layer_has_its_own_keys():
    query, cache = problem()
    _, other = problem(seed=1)
    names = [name for name in vars(cache) if name.endswith(("keys", "values"))]
    both = {name: getattr(cache, name) + getattr(other, name) for name in names}
    cache_of_two = dataclasses.replace(cache, **both)
    for layer, single in enumerate((cache, other)):
        got = attend(query, cache_of_two, layer)
        np.testing.assert_array_equal(got, attend(query, single, 0))


def test_bfloat16_is_summed_in_float32():
    query, cache = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, problem()
    )
    out = attend(query, cache, 0)
    assert out.dtype == jnp.bfloat16
    expected = one_softmax(query, cache)
    assert np.abs(np.asarray(out, np.float64) - expected).max() < 2**-6 * np.abs(expected).max()
    # Read from the program, since XLA may skip a rounding.
    program = str(
        jax.make_jaxpr(lambda *inputs: decode_attention(*inputs, 0, OPTIONS))(query, cache)
    )
    dots = program.count("dot_general[")
    assert dots and dots == program.count("preferred_element_type=float32")
