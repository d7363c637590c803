"""In bfloat16 the sampler says of its tokens what the trainer's forward pass in bfloat16 says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_models import KEY, UNTIED, sampling, trainer_view
from test_families_sampled import FAMILIES

from srft_jax.models import families, init_params
from srft_jax.rollout import Request, sample
from srft_jax.rollout.decode_layout import decode_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = dataclasses.replace(UNTIED, dim=32, mlp_dim=64, vocab_size=64, init_std=0.04)


def policy(logits_std):
    """Float32, as trained; the higher, the more peaked."""
    params = init_params(CONFIG, jax.random.key(0))
    head = jax.random.normal(jax.random.key(1), (CONFIG.dim, CONFIG.vocab_size))
    return params | {"head": logits_std / CONFIG.dim**0.5 * head}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logits_std", "entropy"),
    [
        pytest.param(1.0, (3.0, 4.2), id="flat"),
        pytest.param(8.0, (0.1, 1.0), id="peaked"),
    ],
)
def test_log_probs_are_the_trainers(logits_std, entropy):
    """3072 tokens: prompts of all lengths in packed rows, groups of four, several segments."""
    params, rng = policy(logits_std), np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, 1 + 3 * i).tolist() for i in range(16)]
    config = sampling(max_new_tokens=48, slots=64, segment=16, dtype="bfloat16")
    groups = sample(params, CONFIG, [Request(p, 4) for p in prompts], KEY, config)
    all_entropies, differences, to_float32 = [], [], []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            rough, entropies, exact = (
                trainer_view(
                    prompt, completion.tokens, params=params, config=CONFIG, dtype=dtype, width=96
                )[index]
                for dtype, index in (("bfloat16", 0), ("bfloat16", 1), ("float32", 0))
            )
            all_entropies.append(entropies)
            differences.append(np.abs(completion.logprobs - rough))
            to_float32.append(np.abs(completion.logprobs - exact))
    differences, to_float32 = map(np.concatenate, (differences, to_float32))
    assert len(differences) == 16 * 4 * 48
    assert entropy[0] < np.concatenate(all_entropies).mean() < entropy[1]
    assert differences.mean() <= 2e-3 and np.quantile(differences, 0.999) <= 5e-2
    # It is the rounding that agrees: to float32 the distance is more than that.
    assert to_float32.mean() > 2e-3 > 4 * differences.mean()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_log_probs_of_families_are_the_trainers(family):
    """Windows and two bases of rotary frequencies; outputs of experts that are added up."""
    config = dataclasses.replace(FAMILIES[family], dim=32, vocab_size=64, init_std=0.06)
    params, rng = init_params(config, jax.random.key(0)), np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, 1 + 3 * i).tolist() for i in range(8)]
    settings = sampling(max_new_tokens=48, slots=32, segment=16, dtype="bfloat16")
    groups = sample(params, config, [Request(p, 4) for p in prompts], KEY, settings)
    differences = {"bfloat16": [], "float32": []}
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            for dtype, distances in differences.items():
                trainers, *_ = trainer_view(
                    prompt, completion.tokens, params=params, config=config, dtype=dtype, width=96
                )
                distances.append(np.abs(completion.logprobs - trainers))
    rough, exact = (np.concatenate(distances) for distances in differences.values())
    assert exact.mean() > 1e-3 > 10 * rough.mean()


def test_decode_reads_rounded_matrices_and_whole_scales():
    """Side by side where they multiply the same vector."""
    params = policy(1.0)
    converted = decode_params(params, CONFIG, "bfloat16", mesh=None)
    scales = {entry.name for entry in families.parameters(CONFIG) if entry.is_scale}
    for layer in converted["layers"]:
        for name, leaf in layer.items():
            assert leaf.dtype == (jnp.float32 if name in scales else jnp.bfloat16), name
    for name in {*converted} - {"layers"}:
        assert converted[name].dtype == (jnp.float32 if name in scales else jnp.bfloat16), name
    parts = [params["layers"][name][1].astype(jnp.bfloat16) for name in ("gate", "up")]
    np.testing.assert_array_equal(converted["layers"][1]["gate_up"], np.hstack(parts))
