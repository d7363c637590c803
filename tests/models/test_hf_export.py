"""Exports to Hugging Face directories: bit for bit, in parts, by several processes, killed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils.epath import testing as epath_testing
from tiny_models import TIED, UNTIED, random_params

from srft_jax.config import UsageError
from srft_jax.models import families, load_hf, save_hf
from srft_jax.models.hf_config import to_hf_config
from srft_jax.models.hf_export import export_hf, write_model_files
from srft_jax.models.hf_json import write_json

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("exporting_processes.py")


@pytest.fixture
def model(tmp_path):
    save_hf(tmp_path / "model", TIED, random_params(TIED))
    return tmp_path / "model"


def assert_same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def stored_model(path, dtype):
    """A model as another program would store it; name -> tensor."""
    random = np.random.default_rng(3)
    tensors = {
        name: random.normal(size=families.hf_shape(parameter, UNTIED)).astype(dtype)
        for parameter in families.parameters(UNTIED)
        for name in families.hf_names(parameter, UNTIED)
    }
    path.mkdir()
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    write_json(path / "config.json", to_hf_config(UNTIED))
    return tensors


@pytest.mark.parametrize(
    ("dtype", "part_bytes"),
    [("float32", 2**30), ("float16", 9_000), ("bfloat16", 9_000), ("bfloat16", 2**30)],
)
def test_through_float32_and_back_bit_for_bit(dtype, part_bytes, tmp_path):
    tensors = stored_model(tmp_path / "first", np.dtype(dtype))
    config, params = load_hf(tmp_path / "first")
    save_hf(tmp_path / "second", config, params, dtype=dtype, part_bytes=part_bytes)
    raw = json.loads((tmp_path / "second/config.json").read_text())
    assert (raw["dtype"], raw["torch_dtype"]) == (dtype, dtype)
    files = sorted(tmp_path.glob("second/*.safetensors"))
    written = {}
    for file in files:
        written |= safetensors.numpy.load_file(file)
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # tensors are aligned
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].tobytes() == tensor.tobytes(), name
    assert_same(load_hf(tmp_path / "second")[1], params)
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and part_bytes == 2**30
        return
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(x.nbytes for x in safetensors.numpy.load_file(file).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= part_bytes
    index = json.loads((tmp_path / "second/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(x.nbytes for x in tensors.values())


def test_float16_that_does_not_reach_is_said(tmp_path):
    params = random_params(TIED)
    params["layers"]["down"] = params["layers"]["down"].at[1, 2, 3].set(70_000.0)
    with pytest.raises(UsageError, match="1.mlp.down_proj.weight has values beyond float16"):
        save_hf(tmp_path / "model", TIED, params, dtype="float16")
    assert not (tmp_path / "model").exists()
    save_hf(tmp_path / "model", TIED, params, dtype="bfloat16")


def test_params_of_another_architecture_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"'head': \(\(32, 64\), None\)"):
        save_hf(tmp_path / "model", TIED, random_params(UNTIED))
    assert not any(tmp_path.iterdir())


class Killing:
    """A tokenizer during whose export the process is killed."""

    def save(self, path):
        (Path(path) / "tokenizer.json").write_text("half a file")
        raise KeyboardInterrupt


def test_killed_export_leaves_the_old_model(model):
    old, new = random_params(TIED), random_params(TIED, 5)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            save_hf(model, TIED, new, Killing())
        assert_same(load_hf(model)[1], old)
        model.rename(
            model.with_name(".model.replaced")
        )  # as a kill between two renamings leaves it
    save_hf(model, TIED, new)
    assert_same(load_hf(model)[1], new)
    assert [file.name for file in model.parent.iterdir()] == ["model"]


def test_other_directories_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not a Hugging Face model, so it is not overwritten"):
        save_hf(tmp_path, TIED, random_params(TIED))
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(UsageError, match="thesis.tex/model cannot be made: Not a directory"):
        save_hf(tmp_path / "thesis.tex" / "model", TIED, random_params(TIED))


def test_object_stores(tmp_path, monkeypatch):
    """The mocked gs://bucket is the folder `gs:/bucket` here."""
    monkeypatch.chdir(tmp_path)
    params = random_params(TIED)
    with epath_testing.mock_epath():
        write_model_files("gs://bucket/model", TIED, None, dtype="bfloat16")
        for _ in range(2):  # the second replaces the first
            export_hf(
                "gs://bucket/hf", "gs://bucket/model", params, dtype="float32", part_bytes=20_000
            )
    assert_same(load_hf(tmp_path / "gs:/bucket/hf")[1], params)
    assert sorted(os.listdir("gs:/bucket")) == ["hf", "model"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, {"eos_token_id": 1, "pad_token_id": 0}),
        ({}, {"eos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": 1}, {"eos_token_id": 1, "pad_token_id": 0}),
        (
            {"eos_token_id": 7, "top_p": 0.5},
            {"eos_token_id": [1, 7], "pad_token_id": 0, "top_p": 0.5},
        ),
        ({"eos_token_id": [7, 1], "pad_token_id": 3}, {"eos_token_id": [7, 1], "pad_token_id": 3}),
    ],
)
def test_defaults_of_generation_stay(source, expected, tmp_path):
    from srft_jax.models.tokenizer import load_tokenizer

    if source is not None:
        write_json(tmp_path / "generation_config.json", source)
    tokenizer = load_tokenizer(ROOT / "assets" / "tokenizer")
    write_model_files(tmp_path / "m", TIED, tokenizer, dtype="float32", source=tmp_path)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == expected


def start(*arguments):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_import_and_export_together(tmp_path):
    """Two devices each; process 1 does not see the directory that process 0 writes."""
    tensors = stored_model(tmp_path / "first", np.dtype("bfloat16"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [start(port, number, tmp_path) for number in (0, 1)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    said = [out.splitlines()[-1] for out, _ in outputs]  # after what Gloo says
    assert said == ["2 of 4 shards of the embedding"] * 2
    assert sorted(os.listdir(tmp_path)) == ["0", "first"]
    written = {}
    files = sorted(tmp_path.glob("0/hf/*.safetensors"))
    assert len(files) > 2
    for file in files:
        written |= safetensors.numpy.load_file(file)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].tobytes() == tensor.tobytes(), name
