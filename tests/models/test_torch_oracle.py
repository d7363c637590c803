"""Logits against transformers' on random small models, both ways. Run by `pytest -m oracle`."""

import numpy as np
import pytest
from tiny_models import FAMILIES, TIED, logits, random_params

from srft_jax.config import ModelConfig, RopeScaling
from srft_jax.models import load_hf, save_hf
from srft_jax.models.hf_config import to_hf_config
from srft_jax.models.hf_config_keys import SPELLINGS

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

T = 24  # longer than any window


def random_scaling(rng: np.random.Generator) -> RopeScaling | None:
    length = int(rng.choice([64, 4096]))
    yarn = dict(beta_fast=float(rng.choice([32, 8])), truncate=bool(rng.integers(2)))
    return [
        None,
        RopeScaling("linear", float(rng.uniform(1, 8))),
        RopeScaling("llama3", 8.0, length, float(rng.choice([1, 2])), 4.0),
        RopeScaling("yarn", float(rng.uniform(2, 8)), length, **yarn),
        RopeScaling("yarn", 4.0, length, attention_factor=0.7),
        RopeScaling("yarn", 40.0, length, mscale=0.8, mscale_all_dim=1.3),
    ][rng.integers(6)]


def windows(family: str, num_layers: int, rng: np.random.Generator) -> dict:
    """A window in none, some or all of the layers that may slide in this family."""
    if family == "llama":
        return {}
    first = int(rng.integers(num_layers + 1))
    full = tuple(range(first)) if family in ("qwen2", "qwen3", "gemma3") else ()
    if first == num_layers:
        return {}
    return {"sliding_window": int(rng.integers(1, 9)), "full_attention_layers": full}


def random_config(family: str, seed: int) -> ModelConfig:
    """Grouped and plain heads, head widths that are not D / N, tied and untied, all features."""
    rng = np.random.default_rng(seed)
    kv_heads, num_layers = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    fields = dict(
        family=family,
        vocab_size=int(rng.integers(20, 90)),
        dim=36 * int(rng.integers(1, 3)),
        num_layers=num_layers,
        num_heads=kv_heads * int(rng.choice([1, 2, 4] if kv_heads != 2 else [1, 2, 3])),
        num_kv_heads=kv_heads,
        head_dim=2 * int(rng.integers(2, 9)),
        mlp_dim=int(rng.integers(8, 70)),
        rope_theta=float(10 ** rng.uniform(2, 6)),
        rope_scaling=random_scaling(rng),
        norm_epsilon=float(10 ** rng.uniform(-6, -4)),
        tie_embeddings=bool(rng.integers(2)),
        max_positions=40_000,
        attention_bias=bool(rng.integers(2)),
        mlp_bias=bool(rng.integers(2)),
        activation=str(rng.choice(["silu", "gelu_pytorch_tanh"])),
        query_pre_attn_scalar=int(rng.integers(4, 40)),
        logit_softcap=[None, 2.0][rng.integers(2)],
        rope_local_theta=float(10 ** rng.uniform(2, 6)),
        num_experts=(experts := int(rng.integers(2, 9))),
        experts_per_token=int(rng.integers(1, experts + 1)),
        norm_topk_prob=bool(rng.integers(2)),
    ) | windows(family, num_layers, rng)
    family_fields = {"family", *SPELLINGS[family].fields, *windows(family, num_layers, rng)}
    family_fields |= {"rope_theta", "rope_scaling", "sliding_window", "full_attention_layers"}
    family_fields |= {"rope_local_theta"} if family == "gemma3" else set()
    return ModelConfig(**{name: value for name, value in fields.items() if name in family_fields})


def random_inputs(config: ModelConfig, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions, mask [5, T]: rows padded left and right, two at far positions."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (5, T))
    pads = np.array([[0], [6], [0], [3], [0]])
    positions = np.maximum(np.arange(T) - pads, 0)
    positions[2] += 30_000
    positions[3] *= 1_500
    mask = np.arange(T) >= pads
    mask[4, -7:] = False
    return tokens, positions, mask.astype(np.int64)


def their_model(path):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        experts_implementation="eager",  # the other one wants widths that are multiples of 4
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model


def their_logits(model, tokens, positions, mask):
    import torch

    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return out.logits.numpy()


def assert_same_logits(path, config, params, seed):
    """Five rows have transformers' logits; three in a sixth row have their own."""
    model, inputs = their_model(path), random_inputs(config, seed)
    theirs, (tokens, _, mask) = their_logits(model, *inputs), inputs
    lengths = (9, 8, 7)
    positions = np.concatenate([np.arange(length) for length in lengths])
    segments = np.repeat(np.arange(1, 4), lengths)
    packed = tokens[0], positions, segments
    rows = [np.vstack([five, sixth]) for five, sixth in zip(inputs, packed, strict=True)]
    *ours, ours_packed = np.asarray(logits(params, config, *rows))
    assert np.abs(theirs).mean() > 0.05
    assert np.abs(ours - theirs)[mask > 0].max() < 1e-4
    for segment in range(1, 4):
        here = segments == segment
        alone = (x[here][None] for x in (tokens[0], positions, np.ones_like(tokens[0])))
        assert np.abs(ours_packed[here] - their_logits(model, *alone)[0]).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_ours_to_transformers(tmp_path, family, seed):
    config = random_config(family, seed)
    params = random_params(config, seed)
    save_hf(tmp_path / "model", config, params)
    assert load_hf(tmp_path / "model")[0] == config
    assert_same_logits(tmp_path / "model", config, params, seed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6, 10))
def test_transformers_to_ours(tmp_path, family, seed):
    """transformers makes the config and random weights, and writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    drawn = random_config(family, seed)
    torch.manual_seed(seed)
    written = to_hf_config(drawn)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="10KB" if seed % 2 else "1GB")
    config, params = load_hf(tmp_path / "model")
    assert config == drawn
    assert_same_logits(tmp_path / "model", config, params, seed)


def test_export_of_an_import_is_the_same_model(tmp_path):
    save_hf(tmp_path / "ours", TIED, random_params(TIED))
    their_model(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    assert config == TIED
    assert_same_logits(tmp_path / "ours", config, params, 0)
