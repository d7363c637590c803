"""The forward pass against itself: cached, packed, rematerialised, causal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TIED, UNTIED, jit_forward, logits, random_params

from srft_jax.models import Runtime, families, forward, init_params, output_head
from srft_jax.models.decoder import init_cache


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


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_init_params_follow_the_table(config):
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    flat = {"/".join(k.key for k in path): x for path, x in jax.tree.leaves_with_path(params)}
    assert {*flat} == {row.path for row in families.parameters(config)}
    for row in families.parameters(config):
        lead = (config.num_layers,) if row.stacked else ()
        assert flat[row.path].shape == lead + families.shape(row, config), row.path
    head = jax.eval_shape(lambda params: output_head(params, config), params)
    assert head.shape == (config.dim, config.vocab_size)


def test_decode_equals_forward():
    """Prompts of 6 and 3 tokens, the shorter padded on the left, then five tokens one at a time."""
    params = random_params(TIED)
    num_prompt, num_all = 6, 11
    tokens = np.random.default_rng(2).integers(1, TIED.vocab_size, (2, num_all), np.int32)
    pads = np.array([[0], [3]], np.int32)
    slots = np.arange(num_all, dtype=np.int32)
    segment_ids = (slots >= pads).astype(np.int32)
    positions = np.maximum(slots - pads, 0)
    cache, decoded = init_cache(TIED, 2, num_all + 2), []
    for start, stop in [(0, num_prompt)] + [(n, n + 1) for n in range(num_prompt, num_all)]:
        inputs = (x[:, start:stop] for x in (tokens, positions, segment_ids))
        out = jit_forward(params, TIED, *inputs, cache=cache)
        cache = out.cache
        decoded.append(out.hidden)
    decoded = np.concatenate(decoded, axis=1)
    assert int(cache.length) == num_all

    # The whole rows at once, without a cache, the padding on the other side.
    tokens[1] = np.roll(tokens[1], -3)
    whole = jit_forward(params, TIED, tokens, np.stack([slots, slots]), segment_ids[:, ::-1])
    np.testing.assert_allclose(decoded[0], whole.hidden[0], atol=1e-5)
    np.testing.assert_allclose(decoded[1, 3:], whole.hidden[1, :-3], atol=1e-5)


def test_scan_equals_unrolled():
    """Without a cache the layers are scanned, with one they are unrolled."""
    params, inputs = random_params(TIED), one_row([1] * 7)
    cache = init_cache(TIED, 1, 7)

    def scanned(params):
        return forward(params, TIED, *inputs).hidden

    def unrolled(params):
        return forward(params, TIED, *inputs, cache=cache).hidden

    assert "scan[" in str(jax.make_jaxpr(scanned)(params))
    assert "scan[" not in str(jax.make_jaxpr(unrolled)(params))
    np.testing.assert_allclose(jax.jit(scanned)(params), jax.jit(unrolled)(params), atol=1e-5)


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


def test_gradients_reach_exactly_the_earlier_tokens_of_the_segment():
    params, inputs = random_params(TIED), one_row([1] * 4 + [2] * 3)
    tokens, _, segment_ids = (x[0] for x in inputs)
    projection = np.random.default_rng(3).normal(size=TIED.dim).astype(np.float32)

    def outputs(embedding):
        out = forward(params | {"embedding": embedding}, TIED, *inputs)
        return out.hidden[0] @ projection  # [T]

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"])  # [T, V, D]
    reached = np.asarray(jnp.abs(jacobian[:, tokens]).max(axis=-1) > 0)  # tokens are all different
    causal = np.tril(np.ones((7, 7), bool))
    np.testing.assert_array_equal(reached, causal & (segment_ids[:, None] == segment_ids[None, :]))


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
