"""Exports of adapters against peft and transformers. Run by `pytest -m oracle`."""

import numpy as np
import pytest
from tiny_models import UNTIED, logits, random_params

from srft_jax.config import LoraConfig
from srft_jax.models import lora, save_hf
from srft_jax.models.hf_export import save_peft

pytestmark = pytest.mark.oracle

TOKENS = np.random.default_rng(0).integers(0, UNTIED.vocab_size, (3, 10))


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    "section",
    [
        LoraConfig(rank=4, alpha=6.0),
        LoraConfig(rank=3, alpha=1.5, targets=("query", "output", "down")),
    ],
    ids=["all", "some"],
)
def test_both_exports_compute_what_we_compute(section, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = lora.adapted(UNTIED, section)
    params = random_params(config)
    positions = np.broadcast_to(np.arange(10), TOKENS.shape)
    ours = logits(params, config, TOKENS, positions, np.ones_like(TOKENS))

    save_hf(tmp_path / "base", UNTIED, lora.frozen(params, config))
    save_hf(tmp_path / "merged", config, params)
    save_peft(tmp_path / "adapter", config, params, str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert np.abs(their_logits(base) - ours).mean() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(their_logits(merged), ours, rtol=0, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(their_logits(adapted), ours, rtol=0, atol=1e-4)
    settings = adapted.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (section.rank, section.alpha)
    assert len(settings.target_modules) == len(section.targets)
    named = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(named) == 2 * UNTIED.num_layers * len(section.targets)
