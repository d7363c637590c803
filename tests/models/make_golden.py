"""Makes tests/models/golden: tiny random models and the logits that transformers computes.

    python tests/models/make_golden.py        (needs torch; about 300 KB)

`tied` and `untied` are Qwen2 with their weights, in float32 and in bfloat16; of every family there
are config.json, as transformers writes it, and logits: the weights are made by `random_params`. All
logits are computed in float32.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny_models import FAMILIES, random_params
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from srft_jax.models import save_hf

GOLDEN = Path(__file__).parent / "golden"
PADS = 5  # of the second row, on the left


def make_model(tied: bool, rope_theta: float, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which hides mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    return model


def inputs(seed: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions, mask, each [3, T]: a plain row, a left-padded one, one with wide gaps."""
    tokens = np.random.default_rng(seed).integers(0, 64, (3, num_tokens))
    positions = np.tile(np.arange(num_tokens), (3, 1))
    positions[1] = np.maximum(positions[1] - PADS, 0)
    positions[2] = positions[2] ** 2 * 30  # up to 3630
    mask = np.ones((3, num_tokens), np.int64)
    mask[1, :PADS] = 0
    return tokens, positions, mask


def reference_logits(
    model: PreTrainedModel, tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return out.logits.numpy()


def save_logits(name: str, model: PreTrainedModel, num_tokens: int) -> None:
    arrays = inputs(len(name), num_tokens)
    np.savez_compressed(
        GOLDEN / name / "logits.npz",
        **dict(zip(("tokens", "positions", "mask"), arrays, strict=True)),
        logits=reference_logits(model.eval(), *arrays),
    )


def main() -> None:
    for family, config in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            save_hf(f"{directory}/model", config, random_params(config))
            model = AutoModelForCausalLM.from_pretrained(
                f"{directory}/model", dtype=torch.float32, attn_implementation="eager"
            )
        model.config.save_pretrained(GOLDEN / family)
        save_logits(family, model, num_tokens=20)
    for name, tied, theta, dtype in (
        ("tied", True, 10_000.0, torch.float32),
        ("untied", False, 1_000_000.0, torch.bfloat16),
    ):
        make_model(tied, theta, seed=len(name)).to(dtype).save_pretrained(GOLDEN / name)
        model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
        save_logits(name, model, num_tokens=12)


if __name__ == "__main__":
    main()
