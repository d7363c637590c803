"""Low-rank adapters: what they compute, their gradient, what is trained, and the merged export."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import FAMILIES, TIED, UNTIED, jit_forward, logits, random_params

from srft_jax.config import LoraConfig, UsageError
from srft_jax.models import families, init_params, load_hf, lora, save_hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA = LoraConfig(rank=3, alpha=6.0)
SOME = LoraConfig(rank=2, alpha=1.0, targets=("value", "down"))
ADAPTED = lora.adapted(UNTIED, LORA)
INPUTS = np.arange(1, 8)[None], np.arange(7)[None], np.array([[1] * 5 + [2] * 2])

jit_init = jax.jit(init_params, static_argnums=0)

rows = pytest.mark.parametrize("config", [ADAPTED, lora.adapted(TIED, SOME)], ids=["all", "some"])


@pytest.mark.slow
def test_a_fresh_adapter_changes_nothing():
    params = jit_init(ADAPTED, jax.random.key(3))
    plain, base = jit_init(UNTIED, jax.random.key(3)), lora.frozen(params, ADAPTED)
    for leaf, expected in zip(jax.tree.leaves(base), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    np.testing.assert_array_equal(logits(params, ADAPTED, *INPUTS), logits(base, UNTIED, *INPUTS))


def test_initial_factors_are_those_of_peft():
    """A is uniform up to 1 / sqrt(in) in each layer, B is 0."""
    layers = jit_init(ADAPTED, jax.random.key(3))["layers"]
    for target in LORA.targets:
        a, b = (np.asarray(layers[name]) for name in families.adapter_names(target))
        bound = a.shape[1] ** -0.5
        assert a.shape[::2] == (2, 3) and b.shape[:2] == (2, 3) and not b.any()
        assert 0.9 * bound < np.abs(a).max(axis=(1, 2)).min() <= np.abs(a).max() <= bound


@rows
def test_the_trained_part_is_the_adapters(config):
    params = random_params(config)
    trained, frozen = lora.trained(params, config), lora.frozen(params, config)
    names = {name for target in config.lora.targets for name in families.adapter_names(target)}
    assert trained.keys() == {"layers"} and trained["layers"].keys() == names
    assert not names & frozen["layers"].keys()
    assert jax.tree.structure(lora.whole(frozen, trained)) == jax.tree.structure(params)
    plain = lora.base(config)
    assert lora.trained(frozen, plain) is frozen and lora.frozen(frozen, plain) == {}


def merged_params(params, config):
    """W + scale A B, by NumPy in float64."""
    layers = dict(lora.frozen(params, config)["layers"])
    for target in config.lora.targets:
        a, b = (
            np.asarray(params["layers"][name], np.float64)
            for name in families.adapter_names(target)
        )
        product = config.lora.alpha / config.lora.rank * (a @ b)
        layers[target] = jnp.asarray(layers[target] + product, jnp.float32)
    return lora.frozen(params, config) | {"layers": layers}


def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule():
    """dA = scale dW B^T and dB = scale A^T dW."""
    config = ADAPTED
    params = jax.tree.map(lambda x: 0.5 * x, random_params(config))  # not chaotic
    base, adapters = lora.frozen(params, config), lora.trained(params, config)
    slopes = np.random.default_rng(5).normal(size=(1, 7, config.dim)).astype(np.float32)

    def loss(params, config):
        return (slopes * jit_forward(params, config, *INPUTS).hidden).sum()

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(lambda part: loss(lora.whole(base, part), config)))(adapters)
        merged = merged_params(params, config)
        dense = jax.jit(jax.grad(lambda params: loss(params, lora.base(config))))(merged)
    scale = config.lora.alpha / config.lora.rank
    for target in config.lora.targets:
        names = families.adapter_names(target)
        a, b = (np.asarray(adapters["layers"][name], np.float64) for name in names)
        expected = (
            scale * dense["layers"][target] @ b.swapaxes(1, 2),
            scale * a.swapaxes(1, 2) @ dense["layers"][target],
        )
        for name, gradient in zip(names, expected, strict=True):
            tolerance = 1e-5 * np.abs(gradient).max()
            assert tolerance > 0
            np.testing.assert_allclose(
                gradients["layers"][name], gradient, rtol=0, atol=tolerance, err_msg=name
            )


@rows
def test_the_export_has_the_adapters_in_its_matrices(config, tmp_path):
    params = random_params(config)
    save_hf(tmp_path / "model", config, params)
    plain, loaded = load_hf(tmp_path / "model")
    assert plain == lora.base(config)
    expected = merged_params(params, config)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, expected)
    unmerged, without = (
        logits(params, config, *INPUTS),
        logits(lora.frozen(params, config), plain, *INPUTS),
    )
    np.testing.assert_allclose(logits(loaded, plain, *INPUTS), unmerged, rtol=0, atol=1e-4)
    assert np.abs(unmerged - without).mean() > 0.1


def test_a_bfloat16_base_is_merged_in_float32(tmp_path):
    params = random_params(ADAPTED)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.frozen(params, ADAPTED))
    rounded = lora.whole(base, lora.trained(params, ADAPTED))
    save_hf(tmp_path / "model", ADAPTED, rounded)
    merged = load_hf(tmp_path / "model")[1]["layers"]["up"]
    expected = merged_params(rounded, ADAPTED)["layers"]["up"]
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)
    assert np.abs(merged - merged.astype(jnp.bfloat16)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), "model.lora.rank = 0 is not above 0"),
        (dict(alpha=-1.0), "model.lora.alpha = -1.0 is not above 0"),
        (dict(targets=()), r"model.lora.targets = \[\] must name matrices, each once"),
        (dict(targets=("up", "up")), "must name matrices, each once"),
        (dict(rank=17), "rank = 17 exceeds the smaller side of key, which is 32 x 16"),
    ],
)
def test_what_cannot_be_adapted_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        lora.adapted(TIED, dataclasses.replace(LORA, **changes))


def test_a_matrix_that_the_family_lacks_is_refused():
    moe = FAMILIES["qwen3_moe"]  # each expert has its own matrices
    with pytest.raises(UsageError, match="has gate, of which the family qwen3_moe has no single"):
        lora.adapted(moe, LORA)
    some = dataclasses.replace(LORA, targets=("query", "output"))
    assert lora.adapted(moe, some).lora.targets == ("query", "output")
