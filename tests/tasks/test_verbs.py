"""Each verb as a user starts it: exit code, what it prints, what it leaves."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny_runs import metrics_lines, tiny_arguments, tiny_config

from srft_jax.config import parse
from srft_jax.models.hf_import import load_hf


def stored(run_dir):
    """A run directory is started from its own config.yaml."""
    return f"--config={run_dir}/config.yaml"


@pytest.fixture
def run_dir(tmp_path, trained):
    """A copy that may be changed, without what was made from the checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("hf", "report.html"))
    return copy


def test_a_step_is_not_charged_for_what_evaluations_compiled(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step" in row]
    assert len(steps) == 6 and steps[0]["perf/compilations"] > 0
    assert all(row["time/compile"] <= row["time/step"] for row in steps)


def test_train_leaves_a_run_directory(trained):
    assert {path.name for path in trained.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "hf",
        "metrics.jsonl",
        "model",
        "report.html",
        "samples.jsonl",
        "stdout.txt",  # the fixture's
        "tensorboard",
    }
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"3", "6"}
    assert [row["step"] for row in metrics_lines(trained)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_train_prints_what_it_does(trained):
    out = (trained / "stdout.txt").read_text()
    for line in (
        "prompts per step                  4",
        "completions per step              12",
        "step 0: pass@1 held_out 0.0%, ood 0.0%",
        "step 6/6  reward 0.000",
        "pass@1    step 0  step 6  change",
        f"model    {trained}/hf",
        f"report   {trained}/report.html",
        f"metrics  {trained}/metrics.jsonl",
    ):
        assert line in out, line
    assert (trained / "config.yaml").read_text() in out  # the resolved config
    assert "demo_nll: null" not in out  # presets are expanded


def test_train_tells_where_the_time_of_rollouts_went(trained):
    rows = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    steps = [row for row in rows if "time/step" in row]
    assert len(steps) == 6
    for row in steps:
        parts = [row[f"time/rollout_{part}"] for part in ("prefill", "decode", "host")]
        assert min(parts) >= 0 and sum(parts) > 0 and row["time/reward_wait"] > 0
        assert sum(parts) + row["time/reward_wait"] <= row["time/rollout"]
        assert row["perf/rollout_tokens_per_second"] > 0 and 0 < row["rollout/occupancy"] <= 1


def test_the_stored_config_is_the_runs(trained):
    config = parse([stored(trained)])[1]
    given = tiny_config(trained)
    assert config.objective.clip_low == 0.2 and given.objective.clip_low is None
    assert (config.training, config.data) == (given.training, given.data)


def test_evaluate(run_dir, command):
    code, out, err = command("evaluate", stored(run_dir), f"--run_dir={run_dir}")
    assert (code, err) == (0, "")
    *lines, values = out.splitlines()
    assert lines[0].split() == ["set", "problems", "pass@1", "mean", "length"]
    assert [line.split()[:2] for line in lines[2:]] == [["held_out", "5"], ["ood", "3"]]
    last = metrics_lines(run_dir)[-1]
    assert json.loads(values) == {k: v for k, v in last.items() if k.startswith("eval/")}


def test_generate(run_dir, command):
    arguments = (stored(run_dir), f"--run_dir={run_dir}", "--generate.completions=2")
    code, out, err = command("generate", *arguments)
    assert (code, err) == (0, "")
    lines = out.split("\n")
    assert sum(bool(re.fullmatch(r"\d([-+*]\d)+", line)) for line in lines) == 2  # held-out prompts
    assert sum(line.startswith("    ") for line in lines) >= 4


def test_report(run_dir, command):
    code, out, err = command("report", stored(run_dir), f"--run_dir={run_dir}")
    assert (code, out, err) == (0, f"report   {run_dir}/report.html\n", "")
    page = (run_dir / "report.html").read_text()
    assert "<svg" in page and "held_out" in page


def test_inspect(tmp_path, command):
    """Into a pipe, hence without colours; without a run, hence without a model."""
    arguments = tiny_arguments(tmp_path / "run", "--inspect.rows=1")
    code, out, err = command("inspect", *arguments)
    assert (code, err) == (0, "")
    assert "\x1b" not in out and not (tmp_path / "run").exists()
    assert "<|user|>{prompt}<|assistant|>" in out
    assert re.search(r"packed row 1: \d+ sequences, \d+ of 32 tokens", out)
    assert re.search(r"<\|user\|>\S+<\|assistant\|>«<think>[\d ]+</think>\d<\|end\|>»", out)


@pytest.mark.slow
def test_an_export_can_be_trained_on(run_dir, trained, command):
    """From model.path, under the default verb; at rate 0, so that it comes out as it went in."""
    shutil.copytree(trained / "hf", run_dir / "base")
    config = f"{run_dir}/other/config.yaml"
    (run_dir / "other").mkdir()
    shutil.copy(run_dir / "config.yaml", config)
    model = ("--model.architecture=null", f"--model.path={run_dir}/base")
    arguments = (*model, "--training.num_steps=1", "--training.optimizer.learning_rate=0")
    code, out, err = command(f"--config={config}", f"--run_dir={run_dir}/next", *arguments)
    assert (code, err) == (0, "")
    assert "step 1/1" in out
    before, after = (load_hf(d)[1]["embedding"] for d in (run_dir / "base", run_dir / "next/hf"))
    np.testing.assert_array_equal(before, after)


def test_help(command):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert "train|evaluate|generate|export|report" in out
    assert "--training.optimizer.learning_rate" in out and "Longest completion" in out
