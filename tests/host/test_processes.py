"""Several processes on one machine are one run; when one of them fails, so do all, at once."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_runs import (
    ROOT,
    metrics_lines,
    samples,
    scored_by_parity,
    tiny_arguments,
)

from srft_jax.config import DataConfig, DistributedConfig, RunConfig, UsageError
from srft_jax.host import processes
from srft_jax.models import load_hf

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def finished(commands, devices=2, timeout=280):
    """Exit code, standard output and error of each command, all started together."""
    paths = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu",
        JAX_NUM_CPU_DEVICES=str(devices),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # nearly all of the time would go to compiling
        PYTHONPATH=paths,
    )
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        deadline = time.monotonic() + timeout
        outputs = [process.communicate(timeout=deadline - time.monotonic()) for process in started]
        return [(process.returncode, *out) for process, out in zip(started, outputs, strict=True)]


def train(count, run_dir, *arguments, script=("run.py",), devices=2):
    """Exit codes of a tiny run by `count` processes, and the output of process 0."""
    port = free_port()
    numbered = [
        [
            f"--distributed.coordinator=127.0.0.1:{port}",
            f"--distributed.num_processes={count}",
            f"--distributed.process_id={number}",
        ]
        for number in range(count if count > 1 else 0)
    ] or [[]]
    results = finished(
        [[*script, "train", *tiny_arguments(run_dir, *arguments, *place)] for place in numbered],
        devices,
    )
    codes, outs, errs = zip(*results, strict=True)
    assert all("error" not in err for err in errs), errs
    assert all("step" not in out and "batch arithmetic" not in out for out in outs[1:])
    return list(codes), outs[0]


def assert_same_metrics(rows, others, rtol):
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in row:
            atol = 1e-5 if "/sampler" in name else 1e-9  # differences of log-probs: rounding alone
            np.testing.assert_allclose(row[name], other[name], rtol, atol=atol, err_msg=name)


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_run(tmp_path):
    """Begun by two processes, stopped by a signal to the second, continued by one on another mesh,
    stopped, and finished by four: the same as a run by one process alone."""
    fixed = HERE.parent / "fixed_rollouts.py"
    flags = scored_by_parity(tmp_path)

    def go_on(run_dir, count, data, fsdp, stop=(0, 0), devices=2):
        mesh = (f"--mesh.data={data}", f"--mesh.fsdp={fsdp}")
        return train(count, run_dir, *flags, *mesh, script=(fixed, *stop), devices=devices)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert go_on(whole, 1, 1, 1, devices=1)[0] == [0]
    codes, out = go_on(parts, 2, 2, 2, stop=(2, 1))
    assert codes == [130, 130] and "processes 2" in out and "stopped after step 2" in out
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["2"]
    assert go_on(parts, 1, 1, 4, stop=(4, 0), devices=4)[0] == [130]
    codes, out = go_on(parts, 4, 2, 4)
    assert codes == [0] * 4 and out.count("step 5/6") == 1

    assert samples(parts) == samples(whole)
    rows = metrics_lines(whole)
    assert len({row["loss/self"] for row in rows if row["step"] and "loss/self" in row}) == 6
    assert_same_metrics(metrics_lines(parts), rows, rtol=1e-5)
    (_, params), (_, others) = load_hf(parts / "hf"), load_hf(whole / "hf")
    np.testing.assert_allclose(params["embedding"], others["embedding"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_share_sampling_and_rewards(tmp_path, trained):
    """Nothing is faked; the samples are those of a run by one process."""
    codes, out = train(2, tmp_path / "run", "--mesh.fsdp=2")
    assert codes == [0, 0] and out.count("step 6/6") == 1
    assert samples(tmp_path / "run") == samples(trained)
    assert_same_metrics(metrics_lines(tmp_path / "run"), metrics_lines(trained), rtol=1e-4)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"hf", "report.html", "model"}
    assert json.loads((tmp_path / "run" / "hf" / "config.json").read_text())


def failing(count, who, how):
    port = free_port()
    script = HERE / "joined_processes.py"
    return finished([(script, port, count, number, who, how) for number in range(count)], 1, 75)


def test_a_mistake_in_one_process_ends_all():
    (code, out, err), (own_code, own_out, own_err) = failing(2, 1, "mistake")
    assert (own_code, own_err) == (2, "error: training.row_length = 3 is too short\n")
    assert code == 1
    assert "error: process 1 of 2 has failed: UsageError: training.row_length = 3 is too s" in err
    assert f"together 2 ['from process 0', '{'from process 1' * 9}']" in out
    assert "together" not in own_out


def test_each_process_shows_its_own_mistake():
    """Also where it learns of the other's before its own is on the terminal."""
    for code, _, err in failing(2, "all", "mistake"):
        assert (code, err) == (2, "error: training.row_length = 3 is too short\n")


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 2])
def test_an_error_in_one_process_ends_all(who):
    results = failing(3, who, "error")
    assert [code for code, _, _ in results] == [1, 1, 1]
    for number, (_, _, err) in enumerate(results):
        assert "ArithmeticError: something broke" in err
        assert (f"process {who} of 3 has failed" in err) == (number != who)
        assert ("Traceback" in err) == (number == who)


@pytest.mark.slow
def test_a_killed_process_ends_all():
    results = failing(3, 1, "killed")
    assert [code for code, _, _ in results] == [1, -9, 1]
    for _, _, err in (results[0], results[2]):
        assert "error: process 1 of 3 has failed: no sign of life for 30 s" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_all_end_when_the_first_process_is_killed():
    (code, _, _), (other_code, _, err) = failing(2, 0, "killed")
    assert code == -9 and other_code != 0
    assert "leader" in err or "process 0 is lost" in err


@pytest.mark.slow
def test_another_configuration_in_one_process_is_named():
    results = failing(2, 0, "configuration")
    assert "error: process 1 has another configuration: seed = 1 (process 0: 0)" in results[0][2]


def test_values_that_differ_are_shown_as_they_are(monkeypatch):
    prompt, other = DataConfig(system_prompt="it (was so)"), DataConfig()
    monkeypatch.setattr(processes, "gathered", lambda config: [RunConfig(data=other), config])
    message = r"data.system_prompt = it \(was so\) \(process 0: None\)"
    with pytest.raises(UsageError, match=message):
        processes._check_same_everywhere(RunConfig(data=prompt))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(num_processes=2), "distributed.coordinator and distributed.process_id is not set"),
        (dict(coordinator="a:1", num_processes=2), "process_id is not set"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "process_id = 2 is not from 0"),
        (dict(coordinator="a", num_processes=2, process_id=0), "coordinator = a is not HOST:PORT"),
    ],
)
def test_numbers_that_say_too_little(section, message):
    with (
        pytest.raises(UsageError, match=message),
        processes.joined("train", RunConfig(distributed=DistributedConfig(**section))),
    ):
        pass


def test_a_job_of_several_tasks_is_found(monkeypatch):
    """SLURM's variables tell the number of tasks; a task that is alone meets nobody."""
    for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    met = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **how: met.append(how))
    monkeypatch.setattr(processes, "Peers", mock.MagicMock())
    for tasks in (1, 4):
        monkeypatch.setenv("SLURM_NTASKS", f"{tasks}")
        alone = RunConfig(distributed=DistributedConfig(num_processes=1))
        for verb, config in (("train", RunConfig()), ("report", RunConfig()), ("train", alone)):
            with processes.joined(verb, config):
                pass
    assert [how["cluster_detection_method"] for how in met] == [None]
