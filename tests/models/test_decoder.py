"""The forward pass against itself: cached, packed, rematerialised, causal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, TIED, UNTIED, jit_forward, logits, random_params

from srft_jax.models import Runtime, families, forward, init_params, output_head
from srft_jax.models.decoder import forward_one, forward_with_keys, rotary_of
from srft_jax.rollout.cache import CacheShape, CacheWrites, empty_cache, put_prompts
from srft_jax.rollout.decode_layout import decode_params


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def one_row(segment_ids):
    """Tokens 1, 2, 3, ..., positions from 0 in each segment: all [1, T]."""
    starts = [segment_ids.index(segment) for segment in segment_ids]
    slots = np.arange(len(segment_ids))
    rows = (slots + 1, slots - starts, np.array(segment_ids))
    return tuple(x[None].astype(np.int32) for x in rows)


ONE_LAYER_WINDOW = dataclasses.replace(FAMILIES["mistral"], num_layers=1)
# Between them these two have every feature that a decode step computes in its own way.
QUICK = ("gemma3", "qwen3_moe")


@pytest.mark.parametrize("config", [TIED, UNTIED, *FAMILIES.values()])
def test_init_params_follow_the_table(config):
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    flat = {"/".join(k.key for k in path): x for path, x in jax.tree.leaves_with_path(params)}
    table = families.parameters(config)
    assert {*flat} == {parameter.path for parameter in table}
    for parameter in table:
        lead = (config.num_layers,) if parameter.stacked else ()
        assert flat[parameter.path].shape == lead + families.shape(parameter, config)
    head = jax.eval_shape(lambda params: output_head(params, config), params)
    assert head.shape == (config.dim, config.vocab_size)


@functools.partial(jax.jit, static_argnames="config")
def filled_cache(params, tokens, positions, segment_ids, *, config):
    """A cache of two rows: the first on a prompt of 5, the second on one of 3, packed together."""
    _, keys, values = forward_with_keys(params, config, tokens, positions, segment_ids)
    shape = CacheShape(rows=2, prompts=2, lanes=1, prompt_capacity=8, capacity=0, segment=6)
    cache = empty_cache(config, shape, "float32")
    writes = CacheWrites(*jnp.array([[0, 0], [0, 5], [5, 3], [0, 1]]))  # row, start, length, slot
    prompt_keys, prompt_values = put_prompts(
        cache.prompt_keys, cache.prompt_values, keys, values, writes
    )
    return dataclasses.replace(
        cache,
        prompt_keys=prompt_keys,
        prompt_values=prompt_values,
        prompt_lengths=jnp.array([5, 3]),
        row_of_lane=jnp.array([[0], [1]]),
        lane_of_row=jnp.array([0, 1]),
    )


@pytest.mark.parametrize(
    "config",
    [TIED, *(FAMILIES[name] for name in QUICK)]
    + [pytest.param(FAMILIES[n], marks=pytest.mark.slow) for n in FAMILIES if n not in QUICK],
    ids=lambda config: config.family,
)
def test_decode_equals_forward(config, quick_compilation):
    """Two prompts prefilled in one packed row, then five tokens one at a time."""
    params = random_params(config)
    lengths, num_new = (5, 3), 5
    whole = np.random.default_rng(2).integers(1, config.vocab_size, (2, 5 + num_new), np.int32)
    _, *packed = one_row([1] * 5 + [2] * 3)
    prompts = np.concatenate([whole[0, :5], whole[1, :3]])[None]
    cache, decoded = filled_cache(params, prompts, *packed, config=config), []
    step_params = decode_params(params, config, "float32", None)
    decode_step = jax.jit(forward_one, static_argnums=(1, 5))
    for step in range(num_new):
        positions = np.array(lengths, np.int32)[:, None] + step
        tokens = np.take_along_axis(whole, positions, axis=1)
        rotary = rotary_of(config, positions)
        hidden, cache = decode_step(step_params, config, tokens[:, 0], rotary, cache, Runtime())
        decoded.append(hidden)
    assert int(cache.num_recent) == num_new

    # The whole rows at once, without a cache; what stands behind the second row is never seen.
    positions = np.tile(np.arange(5 + num_new, dtype=np.int32), (2, 1))
    expected = jit_forward(params, config, whole, positions, np.ones_like(whole)).hidden
    for row, length in enumerate(lengths):
        hidden = np.stack([states[row] for states in decoded])
        np.testing.assert_allclose(hidden, expected[row, length : length + num_new], atol=1e-5)


def test_layers_are_scanned_in_training_and_unrolled_with_a_cache():
    params, inputs = random_params(TIED), one_row([1] * 5 + [2] * 3)
    cache = filled_cache(params, *inputs, config=TIED)
    tokens = np.ones(2, np.int32)
    rotary = rotary_of(TIED, np.ones((2, 1), np.int32))
    step_params = decode_params(params, TIED, "float32", None)

    def scanned(params):
        return forward(params, TIED, *inputs).hidden

    def unrolled(params):
        return forward_one(params, TIED, tokens, rotary, cache, Runtime())

    assert "scan[" in str(jax.make_jaxpr(scanned)(params))
    assert "scan[" not in str(jax.make_jaxpr(unrolled)(step_params))


def test_forward_with_keys_is_forward():
    params, inputs = random_params(TIED), one_row([1] * 5 + [2] * 3)
    hidden, keys, values = jax.jit(forward_with_keys, static_argnums=1)(params, TIED, *inputs)
    np.testing.assert_array_equal(hidden, jit_forward(params, TIED, *inputs).hidden)
    shape = (TIED.num_layers, 1, TIED.num_kv_heads, 8, TIED.head_dim)
    assert keys.shape == values.shape == shape


@pytest.mark.slow
def test_remat_changes_the_program_and_not_the_gradient():
    params, inputs = random_params(TIED), one_row([1] * 4 + [2] * 3)

    def gradient(remat):
        def loss(params):
            return jnp.sin(
                forward(params, TIED, *inputs, runtime=Runtime(remat=remat)).hidden
            ).sum()

        return jax.grad(loss)

    def count(remat, operation):
        return str(jax.make_jaxpr(gradient(remat))(params)).count(operation)

    policies = ("none", "dots", "block")
    plain, dots, block = (count(remat, "dot_general[") for remat in policies)
    assert plain == dots < block  # the forward pass, again
    plain, dots, block = (count(remat, "logistic") for remat in policies)
    assert plain < dots == block
    plain, *others = (jax.jit(gradient(remat))(params) for remat in policies)
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, other
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_remat_does_not_change_the_gradient_of_windows_and_experts(family):
    config = FAMILIES[family]
    params, inputs = random_params(config), one_row([1] * 7 + [2] * 3)

    def gradient(remat):
        def loss(params):
            return jnp.sin(
                forward(params, config, *inputs, runtime=Runtime(remat=remat)).hidden
            ).mean()

        return jax.jit(jax.grad(loss))(params)

    plain, *others = (gradient(remat) for remat in ("none", "dots", "block"))
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, other
        )


@pytest.mark.parametrize(("config", "window"), [(TIED, 7), (ONE_LAYER_WINDOW, 4)])
def test_gradients_reach_exactly_the_earlier_tokens_of_the_segment(config, window):
    params, inputs = random_params(config), one_row([1] * 6 + [2] * 3)
    tokens, _, segment_ids = (x[0] for x in inputs)
    projection = np.random.default_rng(3).normal(size=config.dim).astype(np.float32)

    def outputs(embedding):
        out = forward(params | {"embedding": embedding}, config, *inputs)
        return out.hidden[0] @ projection  # [T]

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"])  # [T, V, D]
    reached = np.asarray(jnp.abs(jacobian[:, tokens]).max(axis=-1) > 0)  # tokens are all different
    seen = np.tril(np.ones((9, 9), bool)) & ~np.tril(np.ones((9, 9), bool), -window)
    np.testing.assert_array_equal(reached, seen & (segment_ids[:, None] == segment_ids[None, :]))


def test_packed_equals_alone():
    params = random_params(TIED)
    tokens, positions, segment_ids = one_row([1] * 4 + [2] * 5 + [0] * 2)
    packed = logits(params, TIED, tokens, positions, segment_ids)
    for cut in (slice(0, 4), slice(4, 9)):
        inputs = (x[:, cut] for x in (tokens, positions, segment_ids))
        alone = logits(params, TIED, *inputs)
        np.testing.assert_allclose(packed[:, cut], alone, atol=1e-5)


def test_rope_theta_is_used():
    """Position 0 is not rotated, and a token alone sees only itself; everything later changes."""
    params, inputs = random_params(TIED), one_row([1] * 6)
    far, near = (
        logits(params, dataclasses.replace(TIED, rope_theta=theta), *inputs)[0]
        for theta in (1_000_000.0, 100.0)
    )
    difference = jnp.abs(far - near).max(axis=-1)
    assert difference[0] == 0
    assert difference[1:].min() > 1e-3, difference


def test_bfloat16_runtime_stays_near_float32():
    params, inputs = random_params(TIED), one_row([1] * 6)
    exact, rough = (
        jit_forward(params, TIED, *inputs, runtime=Runtime(dtype=dtype)).hidden
        for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == jnp.bfloat16
    difference = jnp.abs(exact - rough.astype(jnp.float32)).max() / jnp.abs(exact).max()
    assert 0 < difference < 0.05
