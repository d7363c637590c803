"""Hugging Face directories: round trips, each complaint, exports that die halfway, sharding."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import FAMILIES, TIED, UNTIED, random_params

from srft_jax.config import UsageError
from srft_jax.models import checkpoint_hf, load_hf, save_hf

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def model(tmp_path):
    """A saved model, to be damaged."""
    save_hf(tmp_path / "model", TIED, random_params(TIED))
    return tmp_path / "model"


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def edit_config(model, **changes):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_config(model, key):
    raw = json.loads((model / "config.json").read_text())
    del raw[key]
    (model / "config.json").write_text(json.dumps(raw))


def edit_tensors(model, change):
    file = model / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    "config",
    [
        TIED,
        UNTIED,
        dataclasses.replace(UNTIED, head_dim=6, rope_theta=5e5, norm_epsilon=1e-5, init_std=0.1),
        *FAMILIES.values(),
    ],
)
def test_round_trip_is_bit_exact(tmp_path, config):
    params = random_params(config)
    save_hf(tmp_path / "a/model", config, params)
    loaded_config, loaded = load_hf(tmp_path / "a/model")
    assert loaded_config == config
    assert_same(loaded, params)


def test_shards_hold_the_same_tensors(tmp_path, monkeypatch):
    params = random_params(UNTIED)
    monkeypatch.setattr(checkpoint_hf, "SHARD_BYTES", 20_000)
    save_hf(tmp_path / "model", UNTIED, params)
    files = sorted(file.name for file in tmp_path.glob("model/*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert_same(load_hf(tmp_path / "model")[1], params)

    (tmp_path / "model" / files[1]).unlink()
    with pytest.raises(UsageError, match=f"{files[1]} cannot be read"):
        load_hf(tmp_path / "model")


def test_bfloat16_is_read_into_master_weights_or_kept():
    stored = safetensors.numpy.load_file(GOLDEN / "untied/model.safetensors")["lm_head.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16")):
        head = load_hf(GOLDEN / "untied", dtype=dtype)[1]["head"]
        assert head.dtype == expected
        np.testing.assert_array_equal(head, stored.T)


def test_rope_theta_is_read_in_both_spellings(model):
    drop_config(model, "rope_theta")
    edit_config(model, rope_parameters={"rope_theta": 123.0, "rope_type": "default"})
    assert load_hf(model)[0].rope_theta == 123.0
    drop_config(model, "rope_parameters")
    edit_config(model, rope_theta=456)
    assert load_hf(model)[0].rope_theta == 456.0
    drop_config(model, "rope_theta")
    assert load_hf(model)[0].rope_theta == 10_000.0  # transformers' default


def test_config_keys_that_may_be_left_out(model):
    for key in ("head_dim", "rms_norm_eps", "initializer_range", "hidden_act", "architectures"):
        drop_config(model, key)
    assert load_hf(model)[0] == TIED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures \['LlamaForCausalLM'\]"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type = 'dynamic'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1; only 0.0"),
        ({"num_hidden_layers": 3}, "12 missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"12 unknown: model.layers.1.*\(32,\).* and 8 more"),
        ({"vocab_size": 65}, r"1 misshapen: model.embed_tokens.weight \(64, 32\) .* \(65, 32\)"),
        ({"tie_word_embeddings": False}, r"1 missing: lm_head.weight \(64, 32\)"),
    ],
)
def test_config_that_we_would_compute_wrongly(model, changes, message):
    load_hf(model)
    edit_config(model, **changes)
    with pytest.raises(UsageError, match=message):
        load_hf(model)


def test_broken_directories(model, tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no config.json"):
        load_hf(tmp_path)
    os.truncate(model / "model.safetensors", 1000)
    with pytest.raises(UsageError, match="model.safetensors cannot be read"):
        load_hf(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="neither model.safetensors nor model.safetensors.index"):
        load_hf(model)
    drop_config(model, "hidden_size")
    with pytest.raises(UsageError, match="lacks hidden_size"):
        load_hf(model)
    (model / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json is not JSON"):
        load_hf(model)


def test_wrong_tensors_are_all_named(model):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
        tensors["lm_head.weight"] = np.zeros((64, 32), np.float32)

    edit_tensors(model, damage)
    with pytest.raises(UsageError) as caught:
        load_hf(model)
    assert str(caught.value).endswith(
        "does not fit its config.json: 1 missing: model.norm.weight (32,); "
        "1 unknown: lm_head.weight (64, 32); "
        "1 misshapen: model.layers.0.mlp.up_proj.weight (32, 48) instead of (48, 32)"
    )


def test_params_of_another_architecture_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"'head': \(\(32, 64\), None\)"):
        save_hf(tmp_path / "model", TIED, random_params(UNTIED))
    assert not any(tmp_path.iterdir())


def test_killed_export_leaves_the_old_model(model, monkeypatch):
    old, new = random_params(TIED), random_params(TIED, 5)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_hf, "write_json", killed)  # after the weights
        with pytest.raises(KeyboardInterrupt):
            save_hf(model, TIED, new)
    assert_same(load_hf(model)[1], old)
    save_hf(model, TIED, new)
    assert_same(load_hf(model)[1], new)
    assert [file.name for file in model.parent.iterdir()] == ["model"]


def test_other_directories_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not a Hugging Face model, so it is not overwritten"):
        save_hf(tmp_path, TIED, random_params(TIED))
    assert (tmp_path / "thesis.tex").exists()


MESH_SCRIPT = """
import sys, jax, numpy as np
from srft_jax import mesh as meshes
from srft_jax.config import MeshConfig
from srft_jax.models import load_hf
mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
_, sharded = load_hf(sys.argv[1], mesh=mesh)
_, single = load_hf(sys.argv[1])
jax.tree.map(np.testing.assert_array_equal, sharded, single)
for name in ("layers/query", "layers/down", "layers/key_bias", "embedding", "head"):
    leaf = sharded
    for key in name.split("/"):
        leaf = leaf[key]
    print(name, leaf.sharding.shard_shape(leaf.shape))
"""


def test_mesh_gets_each_parameter_on_its_sharding():
    """In a process of its own, for its eight devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MESH_SCRIPT, str(GOLDEN / "untied")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "layers/query (2, 16, 16)",
        "layers/down (2, 24, 16)",
        "layers/key_bias (2, 8)",
        "embedding (32, 16)",
        "head (16, 32)",
    ]
