"""Every family trains, is evaluated and exported: three steps of SRFT from a saved model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import ROOT, metrics_lines

import run
from srft_jax.config import ModelConfig, RopeScaling
from srft_jax.models import forward, init_params, load_hf, output_head, save_hf
from srft_jax.models.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

QWEN2 = ModelConfig(
    vocab_size=262, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32
)
FAMILIES = {
    "qwen2": QWEN2,
    "qwen3": dataclasses.replace(
        QWEN2, family="qwen3", rope_scaling=RopeScaling("yarn", 4.0, 16), tie_embeddings=False
    ),
    "llama": dataclasses.replace(
        QWEN2, family="llama", rope_scaling=RopeScaling("llama3", 8.0, 16), attention_bias=True
    ),
    "mistral": dataclasses.replace(QWEN2, family="mistral", sliding_window=6),
    "gemma3": dataclasses.replace(
        QWEN2,
        family="gemma3",
        activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=8,
        logit_softcap=30.0,
        sliding_window=6,
        full_attention_layers=(1,),
        rope_local_theta=10_000.0,
    ),
    "qwen3_moe": dataclasses.replace(
        QWEN2, family="qwen3_moe", mlp_dim=16, num_experts=4, experts_per_token=2
    ),
}


def logits(config, params):
    tokens = jnp.arange(12)[None]
    hidden = forward(params, config, tokens, tokens, jnp.ones_like(tokens)).hidden
    return hidden @ output_head(params, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_evaluation_and_export(family, tmp_path):
    model, tokenizer = FAMILIES[family], load_tokenizer(ROOT / "assets" / "tokenizer")
    params = init_params(model, jax.random.key(0))
    save_hf(tmp_path / "base", model, params, tokenizer)
    sizes = [f"--config={ROOT}/tests/tiny.yaml", "--model.architecture=null"]
    place = [f"--model.path={tmp_path}/base", f"--run_dir={tmp_path}/run"]
    theta = ["--model.tokenizer=null", "--model.rope_theta=40000", "--training.num_steps=3"]
    assert run.main(["train", *sizes, *place, *theta]) == 0

    steps = [row for row in metrics_lines(tmp_path / "run") if "loss/total" in row]
    assert len(steps) == 3
    assert all(np.isfinite(row["loss/total"]) and not row["loss/skipped"] for row in steps)
    assert all(row["loss/gradient_norm"] > 0 for row in steps)

    exported, trained = load_hf(tmp_path / "run/hf")
    assert exported == dataclasses.replace(model, rope_theta=40_000.0)
    raw = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert raw["rope_theta"] == 40_000.0
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, trained)
    unchanged = [path for path, x in jax.tree.leaves_with_path(changed) if x == 0]
    assert not unchanged  # every parameter has a gradient
    save_hf(tmp_path / "again", exported, trained)
    np.testing.assert_array_equal(logits(exported, trained), logits(*load_hf(tmp_path / "again")))
