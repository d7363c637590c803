"""An export needs the run directory alone: no data, no model that it started from, any devices."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_runs import NO_PROBLEMS, ROOT, newest_checkpoint, tiny_config, tiny_model

import run
from srft_jax.config import ExportConfig, UsageError
from srft_jax.config.stored_config import check_same_run
from srft_jax.models import init_params, load_hf, save_hf
from srft_jax.models.safetensors_reader import find_tensors
from srft_jax.models.tokenizer import load_tokenizer
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.planned import planned
from srft_jax.tasks.resume import open_run_dir
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_trained
from srft_jax.training.run_export import keep_model_files
from srft_jax.training.state import fresh_state


def flat_params(tree):
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(tree)}


def saved_params(run_dir):
    """Parameters of the newest checkpoint."""
    arrays = newest_checkpoint(run_dir)[1]
    return {k.removeprefix(".params"): v for k, v in arrays.items() if k.startswith(".params")}


def assert_same(params, expected):
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def exported(run_dir, *arguments):
    assert run.main(["export", f"--config={run_dir}/config.yaml", *arguments]) == 0


@pytest.fixture
def run_dir(tmp_path, uninterrupted):
    """A copy that may be changed, which knows that it has moved."""
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy, ignore=shutil.ignore_patterns("hf"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(uninterrupted), str(copy)))
    return copy


def test_export_reloads_to_the_parameters_of_a_checkpoint(run_dir, uninterrupted, capsys):
    exported(run_dir)
    assert capsys.readouterr().out == f"model    {run_dir}/hf\n"
    config = tiny_config(run_dir)
    model_config, params = load_hf(run_dir / "hf")
    assert model_config == tiny_model()
    newest = flat_params(params)
    assert_same(newest, saved_params(run_dir))
    for file in (uninterrupted / "hf").iterdir():  # what training wrote at its end
        assert file.read_bytes() == (run_dir / "hf" / file.name).read_bytes(), file
    turns, tokenizer = [[("user", "1+2")]], load_tokenizer(config.model.tokenizer)
    ids = load_tokenizer(run_dir / "hf").encode_prompts(turns)
    assert ids == tokenizer.encode_prompts(turns)

    exported(run_dir, "--export.step=3", f"--export.path={run_dir}/three")
    shutil.rmtree(run_dir / "checkpoints" / "6")
    three = flat_params(load_hf(run_dir / "three")[1])
    assert_same(three, saved_params(run_dir))
    assert any((three[name] != newest[name]).any() for name in newest)


def test_mistakes_of_an_export(run_dir, tmp_path, capsys):
    def refused(*arguments):
        assert run.main(["export", f"--config={run_dir}/config.yaml", *arguments]) == 2
        return capsys.readouterr().err

    assert "has no checkpoint of step 4; it has those of 3, 6" in refused("--export.step=4")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    assert "is not overwritten" in refused(f"--export.path={tmp_path}/thesis")
    shutil.rmtree(run_dir / "model")
    assert f"{run_dir}/model is not there" in refused()


SAMPLING = {"eos_token_id": [1, 2], "pad_token_id": 0, "top_p": 0.8, "temperature": 0.7}


@pytest.fixture
def base(tmp_path):
    """A model stored in bfloat16, with defaults of sampling and one more end."""
    path = tmp_path / "base"
    config = tiny_config(tmp_path)
    architecture = dataclasses.replace(tiny_model(), init_std=0.1)
    params = init_params(architecture, jax.random.key(7))
    save_hf(path, architecture, params, load_tokenizer(config.model.tokenizer), dtype="bfloat16")
    (path / "generation_config.json").write_text(json.dumps(SAMPLING))
    return path


def test_an_export_needs_neither_data_nor_the_first_model(base, tmp_path):
    """A run at its start; then both are gone. Weights that no step has changed come out as stored,
    from float32 and Orbax, bit for bit."""
    before = {name: tensor.read() for name, tensor in find_tensors(base).items()}
    rows, run_dir = tmp_path / "rows.jsonl", tmp_path / "run"
    text = [{"prompt": f"{i}+1", "answer": str(i + 1), "demonstration": "2"} for i in range(8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in text))
    flags = [*NO_PROBLEMS, f"--data.train.files={rows}"]
    flags += ["--model.architecture=null", f"--model.path={base}"]
    setup = prepare(tiny_config(run_dir, *flags))
    open_run_dir(setup.config, 0)
    keep_model_files(setup.config, setup.model_config, setup.tokenizer)
    check_same_run(dataclasses.replace(setup.config, export=ExportConfig(dtype="float32")))
    with Checkpoints(str(run_dir), 2) as checkpoints:
        params = load_trained(setup.config.model, setup.model_config, setup.mesh, seed=0)
        both = planned(setup).optimizers
        checkpoints.save(5, fresh_state(params, setup.model_config, both, setup.mesh), {})
    shutil.rmtree(base)
    rows.unlink()

    exported(run_dir)
    hf = run_dir / "hf"
    after = find_tensors(hf)
    assert {tensor.stored_as for tensor in after.values()} == {"BF16"}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.read().tobytes() == before[name].tobytes(), name
    assert json.loads((hf / "generation_config.json").read_text()) == SAMPLING
    raw = json.loads((hf / "config.json").read_text())
    assert (raw["dtype"], raw["torch_dtype"], raw["eos_token_id"]) == ("bfloat16", "bfloat16", 1)
    stored = flat_params(load_hf(hf)[1])

    exported(run_dir, "--export.dtype=float32")
    assert {tensor.stored_as for tensor in find_tensors(hf).values()} == {"F32"}
    assert json.loads((hf / "config.json").read_text())["dtype"] == "float32"
    assert_same(flat_params(load_hf(hf)[1]), stored)


@pytest.mark.slow
def test_export_on_other_devices_than_the_run_had(run_dir, uninterrupted):
    """The configuration's mesh, which here fits neither, is not looked at."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "run.py", "export", f"--config={run_dir}/config.yaml"]
    command += ["--mesh.fsdp=3"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    written = (run_dir / "hf" / "model.safetensors").read_bytes()
    assert written == (uninterrupted / "hf" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_other_adapters_than_the_runs_are_refused(run_dir, capsys):
    """A target left out, or another alpha, would make another model without a word."""

    def refused(verb, *arguments):
        assert run.main([verb, f"--config={run_dir}/config.yaml", *arguments]) == 2
        return capsys.readouterr().err

    for verb in ("export", "evaluate", "generate"):
        said = refused(verb, "--model.lora.rank=2")
        assert f"{run_dir} holds a run with other adapters: " in said
        assert "model.lora.rank = 2 (was None)" in said


def test_a_checkpoint_of_another_shape_is_refused(run_dir, capsys):
    raw = json.loads((ROOT / "tests" / "architectures" / "tiny" / "config.json").read_text())
    other = run_dir / "wider" / "config.json"
    other.parent.mkdir()
    other.write_text(json.dumps(raw | {"intermediate_size": 48}))
    wider = f"--model.architecture={other.parent}"
    assert run.main(["generate", f"--config={run_dir}/config.yaml", wider]) == 2
    said = capsys.readouterr().err
    assert "is of a model of another shape: ['layers']['down'] (1, 32, 16) instead of" in said
    assert "(1, 48, 16)" in said


def test_a_stored_configuration_of_another_version_is_named(run_dir, capsys):
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text("sead: 3\n" + text)
    with pytest.raises(UsageError, match=r"config.yaml, of the run that is there, .* 'sead'"):
        check_same_run(tiny_config(run_dir))
