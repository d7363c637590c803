"""Import of Hugging Face directories: every dtype, each complaint, sharding, memory."""

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

from srft_jax.config import MeshConfig, UsageError
from srft_jax.mesh import make_mesh
from srft_jax.models import load_hf, save_hf
from srft_jax.models.safetensors_reader import are_equal, find_tensors

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parent / "golden"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "import_hf.py"


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


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("float64", "bfloat16"),
        ("float32", "bfloat16"),
        ("float16", None),
        ("bfloat16", "float16"),
    ],
)
def test_any_stored_dtype_becomes_any_parameter_dtype(model, stored, dtype):
    """By one rounding, that of NumPy."""
    kind = np.dtype(stored)

    def retype(tensors):
        tensors.update({name: tensor.astype(kind) for name, tensor in tensors.items()})

    edit_tensors(model, retype)
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    layers = load_hf(model, dtype=dtype)[1]["layers"]
    assert layers["up"].dtype == (dtype or "float32")
    for n in range(2):
        expected = tensors[f"model.layers.{n}.mlp.up_proj.weight"]
        assert expected.dtype == kind
        np.testing.assert_array_equal(layers["up"][n], expected.T.astype(layers["up"].dtype))


def test_dtypes_that_are_not_read(model):
    def retype(tensors):
        tensors["model.norm.weight"] = np.ones(32, np.int8)

    with pytest.raises(UsageError, match="dtype float64 need JAX's 64-bit mode: JAX_ENABLE_X64=1"):
        load_hf(model, dtype="float64")
    with pytest.raises(UsageError, match="dtype int8, which is not a float"):
        load_hf(model, dtype="int8")
    edit_tensors(model, retype)
    with pytest.raises(UsageError, match="1 of a dtype that is not read: model.norm.weight I8; "):
        load_hf(model)
    raw = (model / "model.safetensors").read_bytes().replace(b'"I8"', b'"F8_E4M3"')
    length = int.from_bytes(raw[:8], "little") + len("F8_E4M3") - len("I8")
    (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + raw[8:])
    with pytest.raises(UsageError, match="dtype that is not read: model.norm.weight F8_E4M3; "):
        load_hf(model)


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
        (
            {"num_hidden_layers": 3, "layer_types": None},
            "12 missing: model.layers.2.input_layernorm.weight",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": None},
            r"12 unknown: model.layers.1.*\(32,\).* and 8 more",
        ),
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


def split_in_two(model):
    """model.safetensors as two shards, the first with the norms, and their index."""
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {name: "a" if "norm" in name else "b" for name in tensors}
    for file in "ab":
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        safetensors.numpy.save_file(part, model / file)
    write_index(model, weight_map)
    return weight_map


def write_index(model, weight_map):
    text = json.dumps({"weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(text)


def test_an_index_must_fit_its_files(model):
    weight_map = split_in_two(model)
    assert_same(load_hf(model)[1], random_params(TIED))
    norm = "model.norm.weight"
    for wrong, message in (
        (weight_map | {norm: "b"}, r"1 misplaced: model.norm.weight in b \(found in a\)"),
        (weight_map | {"x": "a"}, r"1 misplaced: x in a \(found in None\)"),
        ({k: v for k, v in weight_map.items() if k != norm}, r"in None \(found in a\)"),
        (weight_map | {norm: "c"}, "model/c cannot be read"),
        (None, "index.json has no weight_map"),
        (weight_map | {norm: ["a"]}, "index.json has no weight_map, from each tensor's name"),
    ):
        write_index(model, wrong)
        with pytest.raises(UsageError, match=message):
            load_hf(model)
    write_index(model, weight_map)
    (model / "a").write_bytes((model / "b").read_bytes())
    with pytest.raises(UsageError, match="holds model.embed_tokens.weight twice, .* in b"):
        load_hf(model)
    os.truncate(model / "b", 1000)
    with pytest.raises(UsageError, match="model/b cannot be read: "):
        load_hf(model)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(model):
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    assert_same(load_hf(model)[1], random_params(TIED))
    tensors["lm_head.weight"][-1, -1] += 1e-6
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    with pytest.raises(UsageError, match="a lm_head.weight that differs from model.embed_tokens"):
        load_hf(model)


def test_tensors_are_compared_a_few_rows_at_a_time(model):
    """64 rows in slices of 30, 30 and 4; only the last number differs."""
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["same"], tensors["other"] = embedding.copy(), embedding.copy()
    tensors["other"][-1, -1] += 1e-6
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    stored = find_tensors(model)
    for rows in (1, 30, 64, 4096):
        same, other = (
            are_equal(
                stored["model.embed_tokens.weight"],
                stored[name],
                rows_at_a_time=rows,
            )
            for name in ("same", "other")
        )
        assert same and not other


def test_buffers_of_old_checkpoints_are_not_weights(model):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(model, add)
    assert_same(load_hf(model)[1], random_params(TIED))


def test_experts_are_tensors_of_their_own(tmp_path):
    """[L, E, D, F] of ours is L times E matrices [F, D] of theirs, both ways."""
    config = FAMILIES["qwen3_moe"]
    params = random_params(config)
    save_hf(tmp_path / "model", config, params)
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    up = params["layers"]["expert_up"]
    for layer, expert in np.ndindex(up.shape[:2]):
        stored = tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
        np.testing.assert_array_equal(stored, up[layer, expert].T)
    mesh = make_mesh(MeshConfig())
    assert_same(load_hf(tmp_path / "model", mesh=mesh)[1], params)


def test_wrong_tensors_are_all_named(model):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
        tensors["lm_head.bias"] = np.zeros((64,), np.float32)

    edit_tensors(model, damage)
    with pytest.raises(UsageError) as caught:
        load_hf(model)
    assert str(caught.value).endswith(
        "does not fit its config.json: 1 missing: model.norm.weight (32,); "
        "1 unknown: lm_head.bias (64,); "
        "1 misshapen: model.layers.0.mlp.up_proj.weight (32, 48) instead of (48, 32)"
    )


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
    """A process of its own has the eight devices."""
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


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--devices=8"]])
def test_memory_beyond_the_parameters_is_two_tensors(flags):
    """Two tensors and 100 MiB for programs. The 24 layers of one parameter are 192 MiB as stored,
    more than the largest tensor. glibc may keep up to 130 MiB of freed memory for its threads;
    here it does not, as allocations above its threshold are given back at once."""
    sizes = dict(layers=24, dim=1024, ffn=4096, heads=16, kv_heads=4, head_dim=64, vocab=65536)
    flags += [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    command = [sys.executable, str(BENCHMARK), "--export", "--file-mib=256", *flags]
    environment = {
        "PYTHONPATH": str(BENCHMARK.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["largest_tensor_mib"] == 128
    for what in ("import", "export"):
        beyond = figures[f"{what}_peak_mib"] - figures["params_mib"] - figures["before_mib"]
        assert beyond < 2 * 128 + 100, figures
