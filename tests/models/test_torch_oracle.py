"""Logits against transformers' on random small models, both ways. Run by `pytest -m oracle`."""

import dataclasses

import numpy as np
import pytest
from tiny_models import TIED, logits, random_params

from srft_jax.config import ModelConfig
from srft_jax.models import load_hf, save_hf

pytestmark = pytest.mark.oracle


def random_config(seed: int) -> ModelConfig:
    """Grouped and plain heads, head widths that are not D / N, tied and untied, various thetas."""
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    return ModelConfig(
        vocab_size=int(rng.integers(20, 90)),
        dim=12 * int(rng.integers(1, 5)),
        num_layers=int(rng.integers(1, 4)),
        num_heads=kv_heads * int(rng.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=2 * int(rng.integers(2, 9)),
        mlp_dim=int(rng.integers(8, 70)),
        rope_theta=float(10 ** rng.uniform(2, 6)),
        norm_epsilon=float(10 ** rng.uniform(-6, -4)),
        tie_embeddings=bool(rng.integers(2)),
        max_positions=40_000,
    )


def random_inputs(config: ModelConfig, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions, mask [4, 10]: two rows padded on the left, two at far positions."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (4, 10))
    pads = np.array([[0], [6], [0], [3]])
    positions = np.maximum(np.arange(10) - pads, 0)
    positions[2] += 30_000
    positions[3] *= 4_000
    return tokens, positions, (np.arange(10) >= pads).astype(np.int64)


def their_logits(path, tokens, positions, mask):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return out.logits.numpy()


def assert_same_logits(path, config, params, seed):
    tokens, positions, mask = random_inputs(config, seed)
    theirs = their_logits(path, tokens, positions, mask)
    ours = logits(params, config, tokens, positions, mask)
    assert np.abs(theirs).mean() > 0.05
    assert np.abs(ours - theirs)[mask > 0].max() < 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_ours_to_transformers(tmp_path, seed):
    config = random_config(seed)
    params = random_params(config, seed)
    save_hf(tmp_path / "model", config, params)
    assert_same_logits(tmp_path / "model", config, params, seed)


@pytest.mark.parametrize("seed", range(6, 12))
def test_transformers_to_ours(tmp_path, seed):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    drawn = random_config(seed)
    torch.manual_seed(seed)
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=drawn.vocab_size,
            hidden_size=drawn.num_heads * drawn.head_dim,  # transformers' default head width
            intermediate_size=drawn.mlp_dim,
            num_hidden_layers=drawn.num_layers,
            num_attention_heads=drawn.num_heads,
            num_key_value_heads=drawn.num_kv_heads,
            rms_norm_eps=drawn.norm_epsilon,
            max_position_embeddings=drawn.max_positions,
            tie_word_embeddings=drawn.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": drawn.rope_theta},
        )
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="10KB" if seed % 2 else "1GB")
    config, params = load_hf(tmp_path / "model")
    assert config == dataclasses.replace(drawn, dim=drawn.num_heads * drawn.head_dim)
    assert_same_logits(tmp_path / "model", config, params, seed)


def test_export_of_an_import_is_the_same_model(tmp_path):
    save_hf(tmp_path / "ours", TIED, random_params(TIED))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    assert config == TIED
    assert_same_logits(tmp_path / "ours", config, params, 0)
