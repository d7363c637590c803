"""A run stopped and started again is the run that was never stopped, for every optimizer and for
methods that remember more. Both runs are made here, by programs that are compiled quickly."""

import numpy as np
import pytest
from tiny_runs import (
    assert_same_run,
    metrics_lines,
    newest_checkpoint,
    run_in_process,
    scored_by_parity,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.mark.parametrize(
    "flags",
    [
        ["name=adafactor"],
        ["name=muon", "state_dtype=bfloat16"],
        ["name=muon", "state_dtype=bfloat16", "lora"],
    ],
)
def test_every_optimizer_continues_bit_for_bit(flags, tmp_path, interrupt_in, monkeypatch):
    options = [f"--training.optimizer.{flag}" for flag in flags if flag != "lora"]
    options += ["--model.lora.rank=2"] if "lora" in flags else []
    options += scored_by_parity(tmp_path)
    interrupt_in(3)
    assert run_in_process(tmp_path / "stopped", *options) == 130
    monkeypatch.undo()
    assert run_in_process(tmp_path / "stopped", *options) == 0
    assert run_in_process(tmp_path / "whole", *options) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


METHODS = {
    "sft_rl": (["sft_steps=3"], [2, 3]),  # in the first stage, and at its end
    "relift": (["demo_buffer=5", "gate_solved=1"], [1, 4]),
    "chord": (["demo_per_step=3", "mix_steps=6"], [4]),
}


@pytest.mark.parametrize("preset", METHODS)
def test_stages_buffers_and_further_iterators_continue_bit_for_bit(
    preset, tmp_path, interrupt_in, monkeypatch
):
    """Stopped again and again."""
    coefficients, stops = METHODS[preset]
    flags = [f"--objective.{one}" for one in (f"preset={preset}", *coefficients)]
    flags += scored_by_parity(tmp_path)
    for step in stops:
        interrupt_in(step)
        assert run_in_process(tmp_path / "stopped", *flags) == 130
        found, _, data = newest_checkpoint(tmp_path / "stopped")
        assert (found, bool(data["waiting"])) == (step, preset == "relift")
        monkeypatch.undo()
    assert run_in_process(tmp_path / "stopped", *flags) == 0
    assert run_in_process(tmp_path / "whole", *flags) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    rows = [row for row in metrics_lines(tmp_path / "whole") if "optimizer/updates" in row]
    assert all(row["optimizer/updates"] for row in rows)
    _, arrays, data = newest_checkpoint(tmp_path / "whole")
    names = {name.split("'")[1] for name in arrays if name.startswith(".optimizer_states")}
    assert names == {"policy"} | ({"demonstration"} if preset != "chord" else set())
    moments = [array for name, array in arrays.items() if ".mu" in name]
    assert all(array.any() for array in moments)


def test_a_prolonged_run_equals_a_longer_one(tmp_path):
    """At a constant rate; a cosine's length is the run's, so there it is refused, see below."""
    short, long = tmp_path / "short", tmp_path / "long"
    constant = ("--training.optimizer.schedule=constant", "--evaluation.every=0")
    assert run_in_process(short, *constant, "--training.num_steps=2") == 0
    assert run_in_process(short, *constant, "--training.num_steps=4") == 0
    assert run_in_process(long, *constant, "--training.num_steps=4") == 0
    (step, state, data), (other_step, other_state, other_data) = map(
        newest_checkpoint, (short, long)
    )
    assert (step, data) == (other_step, other_data)
    for name, array in state.items():
        np.testing.assert_array_equal(array, other_state[name], err_msg=name)
