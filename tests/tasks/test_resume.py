"""A run that was stopped and started again is the run that was never stopped."""

import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
from tiny_runs import (
    NO_PROBLEMS,
    assert_same_run,
    metrics_lines,
    newest_checkpoint,
    run_in_process,
    samples,
    tiny_arguments,
)

from srft_jax.config import RunConfig, UsageError, to_yaml
from srft_jax.tasks import resume, train


# Checkpoints and evaluations are due after 3 and 6.
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, 4])
def test_a_stopped_run_continues_bit_for_bit(
    step, tmp_path, uninterrupted, interrupt_in, monkeypatch, capsys
):
    interrupt_in(step)
    assert run_in_process(tmp_path / "run") == 130
    assert f"--config {tmp_path}/run/config.yaml" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "run")[0] == step
    last = metrics_lines(tmp_path / "run")[-1]
    # A stop does not wait for an evaluation: the continued run makes up for it.
    assert last["step"] == step and "eval/held_out/pass@1" not in last
    monkeypatch.undo()
    assert run_in_process(tmp_path / "run") == 0
    assert f"continues after step {step} of 6" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("step", "checkpoint_every"), [(0, 3), (3, 4), pytest.param(3, 3, marks=pytest.mark.slow)]
)
def test_a_signal_in_an_evaluation_stops_the_run_before_another_step(
    step, checkpoint_every, tmp_path, uninterrupted, monkeypatch, capsys
):
    """Also where the evaluated step is none that is saved."""
    measure, arguments = (
        train.measure_pass_at_1,
        [f"--training.checkpoint_every={checkpoint_every}"],
    )
    evaluations = iter((0, 3))

    def measure_and_interrupt(*args):
        if next(evaluations) == step:
            signal.raise_signal(signal.SIGINT)
        return measure(*args)

    monkeypatch.setattr(train, "measure_pass_at_1", measure_and_interrupt)
    assert run_in_process(tmp_path / "run", *arguments) == 130
    assert f"stopped after step {step} and saved" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "run")[0] == step
    last = metrics_lines(tmp_path / "run")[-1]
    assert last["step"] == step and "eval/held_out/pass@1" in last
    monkeypatch.undo()
    assert run_in_process(tmp_path / "run", *arguments) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_checkpoints_hold_what_the_comparison_is_about(uninterrupted):
    """Moments, running entropies and the data position are there, and moved."""
    step, arrays, data = newest_checkpoint(uninterrupted)
    assert (step, arrays[".step"]) == (6, 6)
    assert data == {"iterators": {"prompts": {"next_index": 6}}, "waiting": []} | data
    assert arrays[".entropy_self"] > 0 and arrays[".entropy_demonstration"] > 0
    moments = [name for name in arrays if ".mu" in name or ".nu" in name]
    assert len(moments) == 2 * sum(name.startswith(".params") for name in arrays)
    assert all(arrays[name].any() for name in moments)


def test_a_killed_run_does_the_steps_after_its_checkpoint_again(tmp_path, uninterrupted):
    """Stale lines of steps beyond the checkpoint, the last one torn, as a kill leaves them."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "6")
    stale = json.dumps({"step": 5, "loss/total": -1.0})
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write(f"{stale}\n{stale[:9]}")
    assert "-1.0" in samples(run_dir)
    assert run_in_process(run_dir) == 0
    assert_same_run(run_dir, uninterrupted)


def test_a_run_killed_in_its_last_evaluation_makes_up_for_it(tmp_path, uninterrupted):
    """Its checkpoint was complete by then."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    for name, mark in (("metrics.jsonl", '"time/evaluation"'), ("samples.jsonl", '"held_out"')):
        lines = (run_dir / name).read_text().splitlines(keepends=True)
        evaluated = next(n for n, x in enumerate(lines) if mark in x and '"step": 6' in x)
        (run_dir / name).write_text("".join(lines[:evaluated]))
    assert run_in_process(run_dir) == 0
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
def test_a_run_killed_in_its_first_save_starts_again(tmp_path, uninterrupted):
    """Half a checkpoint is none; it is not somebody else's file in the way either."""
    (tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert run_in_process(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_finished_run_trains_no_further(tmp_path, uninterrupted, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    monkeypatch.delattr(train, "collect")
    assert run_in_process(run_dir) == 0
    assert_same_run(run_dir, uninterrupted)


def test_other_rows_behind_the_same_configuration_are_refused(tmp_path, capsys):
    rows = [{"prompt": f"{i}+1", "answer": str(i + 1), "demonstration": "2"} for i in range(8)]
    file, run_dir = tmp_path / "rows.jsonl", tmp_path / "run"
    arguments = (*NO_PROBLEMS, f"--data.train.files={file}")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_in_process(run_dir, *arguments) == 0
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert run_in_process(run_dir, *arguments) == 2
    assert "now reads other rows" in capsys.readouterr().err


@pytest.mark.slow
def test_a_diverged_run_saves_its_last_sound_state(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert run_in_process(run_dir, "--training.optimizer.learning_rate=1e30") == 1
    assert "no update was made 3 times in a row (training.max_skipped)" in capsys.readouterr().err
    step, arrays, _ = newest_checkpoint(run_dir)
    assert step == metrics_lines(run_dir)[-1]["step"]
    for name, array in arrays.items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--seed=1", "seed = 1 (was 0)"),
        ("--training.optimizer.learning_rate=0.5", "learning_rate = 0.5 (was 0.01)"),
        ("--objective.clip_low=0.1", "objective.clip_low = 0.1 (was 0.2)"),
        ("--data.train.procedural.count=41", "data.train.procedural.count = 41 (was 40)"),
        ("--training.num_steps=7", "training.num_steps = 7 (was 6)"),
    ],
)
def test_another_configuration_is_refused(argument, message, uninterrupted, capsys):
    before = (uninterrupted / "config.yaml").read_text()
    assert run_in_process(uninterrupted, argument) == 2
    assert message in capsys.readouterr().err
    assert (uninterrupted / "config.yaml").read_text() == before


@pytest.mark.slow
def test_ctrl_c_at_the_terminal(tmp_path, start, trained):
    """SIGINT to the whole process group, as a terminal sends it."""
    run_dir = tmp_path / "run"
    process = start("train", *tiny_arguments(run_dir, "--training.num_steps=100000"))
    for line in process.stdout:
        if line.startswith("step      2/100000"):
            os.killpg(process.pid, signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert f"continue with\n  python run.py --config {run_dir}/config.yaml" in out
    step = newest_checkpoint(run_dir)[0]
    assert f"stopped after step {step} and saved" in out
    assert metrics_lines(run_dir)[-1]["step"] == step


def test_a_run_directory_that_another_process_sees_late_or_never(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.jax, "process_index", lambda: 1)
    monkeypatch.setattr(resume, "gathered", lambda sees: [True, sees])
    config, file = RunConfig(run_dir=str(tmp_path)), tmp_path / "config.yaml"
    written = threading.Timer(0.3, file.write_text, [to_yaml(config)])
    written.start()
    resume.open_run_dir(config, 0)
    written.join()
    file.unlink()
    monkeypatch.setattr(resume, "_SEEN_SECONDS", 0.1)
    with pytest.raises(UsageError, match="process 1 does not see the .*config.yaml of process 0"):
        resume.open_run_dir(config, 0)
