"""benchmarks/gpu.py runs at tiny sizes, and its PyTorch arm computes what ours does."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srft_jax.config import ModelConfig
from srft_jax.models import forward, init_params, output_head

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    "--architecture=assets/quickstart_base",
    *("--layers=2", "--row-length=64", "--sequences=2", "--microbatches=3"),
    *("--batch=4", "--prompt=8", "--new=8", "--segment=4", "--iters=1", "--dtype=float32"),
]


@pytest.mark.slow
def test_our_parts_run_and_count_the_same_work():
    command = [sys.executable, "benchmarks/gpu.py", *TINY, "--only", "ours_train", "ours_sample"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    train, sample = found["ours_train"], found["ours_sample"]
    assert train["params"] == sample["params"]
    tokens = 3 * 64
    assert train["tokens_per_s"] == pytest.approx(1e3 * tokens / train["step_ms"], rel=1e-2)
    # Tied, so the embedding multiplies; two sequences of 32 a row, 4 heads of 24, two layers.
    flops = 3 * tokens * (2 * train["params"] + 4 * 32 * 4 * 24 * 2)
    per_second = 1e12 * train["tflops_per_s"]
    assert per_second == pytest.approx(1e3 * flops / train["step_ms"], rel=1e-2)
    assert sample["decode_steps"] == 8
    # Parameters, and keys and values of 2 heads of 24 in 2 layers for 4 rows of 8 + 4 tokens.
    read = 4 * (sample["params"] + 2 * 2 * 2 * 24 * 4 * 12)
    assert 1e9 * sample["floor_gb"] == pytest.approx(read, rel=1e-2)


def test_a_row_that_does_not_split_is_refused():
    command = [sys.executable, "benchmarks/gpu.py", "--row-length=64", "--sequences=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--sequences 3 does not divide" in done.stderr


@pytest.mark.oracle
@pytest.mark.parametrize("tie", [True, False])
def test_pytorch_computes_what_we_compute(tie, monkeypatch):
    """The same logits from the same weights, all at once and one by one out of its cache."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import torch
    import torch_decoder

    model = ModelConfig(32, 16, 2, 4, 2, 8, 24, rope_theta=100.0, tie_embeddings=tie, init_std=0.3)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        init_params(model, jax.random.key(0)),
    )
    theirs = torch_decoder.Decoder(model, "float32")
    theirs.load_state_dict(state_dict(params, tie), strict=True)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 6))
    with jax.default_matmul_precision("highest"), torch.no_grad():
        positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
        hidden = forward(params, model, tokens, positions, jnp.ones_like(positions)).hidden
        ours = np.asarray(hidden @ output_head(params, model))
        at_once = theirs(torch.as_tensor(tokens))
        for block in theirs.blocks:
            block.make_cache(2, 6)
        columns = torch.arange(6)
        parts = [
            theirs(torch.as_tensor(tokens[:, a:b]), columns[a:b], columns <= columns[a:b, None])
            for a, b in ((0, 4), (4, 5), (5, 6))
        ]
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(at_once, ours, atol=1e-4)
    np.testing.assert_allclose(torch.cat(parts, dim=1), ours, atol=1e-4)
    assert sum(x.numel() for x in theirs.parameters()) == sum(
        x.size for x in jax.tree.leaves(params)
    )


def state_dict(params, tie):
    """Ours in the names of the PyTorch model, which joins what multiplies the same vector."""
    import torch

    layers, found = params["layers"], {}
    for number in range(len(layers["query"])):

        def joined(*names, number=number):
            parts = [np.asarray(layers[name][number]).T for name in names]
            return torch.as_tensor(np.concatenate(parts))

        found |= {
            f"blocks.{number}.{name}": value
            for name, value in {
                "attention_norm.weight": joined("attention_norm"),
                "query_key_value.weight": joined("query", "key", "value"),
                "query_key_value.bias": joined("query_bias", "key_bias", "value_bias"),
                "output.weight": joined("output"),
                "mlp_norm.weight": joined("mlp_norm"),
                "gate_up.weight": joined("gate", "up"),
                "down.weight": joined("down"),
            }.items()
        }
    head = params["embedding"] if tie else params["head"].T
    outside = {"embedding.weight": params["embedding"], "norm.weight": params["final_norm"]}
    outside |= {"head.weight": head}
    return found | {name: torch.as_tensor(np.array(x)) for name, x in outside.items()}
