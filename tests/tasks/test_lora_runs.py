"""Whole runs with adapters: checkpoints hold nothing else, resume, reference, both exports."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_runs import (
    ROOT,
    assert_same_run,
    metrics_lines,
    newest_checkpoint,
    run_in_process,
    tiny_config,
    tiny_model,
)

import run
from srft_jax.models import init_params, load_hf, save_hf
from srft_jax.models.tokenizer import load_tokenizer
from srft_jax.setup.prepare import prepare
from srft_jax.training.loading import load_policy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Arguments of the tiny run on a base on disk, in bfloat16, with a KL to it."""
    path = tmp_path_factory.mktemp("base")
    architecture = tiny_model()
    params = init_params(architecture, jax.random.key(4))
    save_hf(path / "base", architecture, params, load_tokenizer(ROOT / "assets" / "tokenizer"))
    return [
        "--model.architecture=null",
        f"--model.path={path}/base",
        "--model.lora.rank=2",
        "--model.lora.base_dtype=bfloat16",
        "--objective.kl=0.1",
        "--training.optimizer.schedule=constant",
        "--training.checkpoint_every=2",
        "--evaluation.every=2",
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory, cache_dir):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_in_process(run_dir, *arguments, "--training.num_steps=4") == 0
    return run_dir


def test_a_prolonged_run_equals_a_longer_one(arguments, whole, tmp_path):
    for steps in (2, 4):
        assert run_in_process(tmp_path / "run", *arguments, f"--training.num_steps={steps}") == 0
    rows = [row for row in metrics_lines(whole) if "policy/reference_kl" in row]
    kl = [row["policy/reference_kl"] for row in rows]
    assert len(kl) == 4 and abs(kl[0]) < 1e-6 < kl[-1]
    assert_same_run(tmp_path / "run", whole)


def test_checkpoints_hold_adapters_alone(whole):
    _, arrays, _ = newest_checkpoint(whole)
    held = [name for name in arrays if name.startswith(".params") or ".mu" in name or ".nu" in name]
    assert len(held) == 3 * 14 and all("_lora_" in name for name in held)
    assert all(arrays[name].any() for name in held)


def test_exports(whole, arguments, capsys):
    """The merged model at the end of training; the adapters alone when asked for, in its place."""
    config = tiny_config(whole, *arguments, "--training.num_steps=4")
    setup, base = prepare(config), load_hf(config.model.path)[1]
    params = load_policy(str(whole), config.model, setup.model_config, setup.mesh, config.seed)
    merged = load_hf(whole / "hf")[1]["layers"]
    for target in config.model.lora.targets:
        a, b = (np.asarray(params["layers"][f"{target}_lora_{x}"]) for x in "ab")
        rounded = np.asarray(base["layers"][target].astype("bfloat16"), np.float32)
        expected = rounded + config.model.lora.scale * a @ b
        np.testing.assert_allclose(merged[target], expected, rtol=0, atol=1e-6)
    assert run.main(["export", f"--config={whole}/config.yaml", "--export.lora=adapter"]) == 0
    assert capsys.readouterr().out == f"model    {whole}/adapter\n"
    assert {path.name for path in (whole / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    settings = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == config.model.path
    tensors = safetensors.numpy.load_file(whole / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], params["layers"]["down_lora_a"][0].T)


def test_an_export_with_another_alpha_or_fewer_targets_is_refused(whole, capsys):
    for change in ("alpha=8", "targets=[query]", "rank=1"):
        arguments = [f"--config={whole}/config.yaml", f"--model.lora.{change}"]
        assert run.main(["export", *arguments]) == 2
        key, value = change.split("=")
        assert f"model.lora.{key} = " in capsys.readouterr().err
