"""Traces of chosen steps can be read, and name the phases of a step."""

import jax
import pytest
from tiny_runs import run_in_process

from srft_jax.host.profiler import Profiler


def names_in(file):
    """Names of all events in a trace, with the scopes of operations."""
    names = set()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                names.add(event.name)
    return names


@pytest.mark.slow
def test_chosen_steps_are_traced(tmp_path):
    assert run_in_process(tmp_path / "run", "--training.profile_steps=[2, 3]") == 0
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"step_2", "step_3"}
    for step in ("step_2", "step_3"):  # where TensorBoard's page looks
        (file,) = folder.glob(f"{step}/plugins/profile/*/*.xplane.pb")
        assert {"step", "rollout", "train"} <= names_in(file)


def test_processes_of_one_machine_do_not_overwrite_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with Profiler(tmp_path, [2]) as profiler:
            profiler.begin(2)
    files = tmp_path.glob("step_2/*/plugins/profile/*/*.xplane.pb")
    assert sorted(file.parts[-5] for file in files) == ["process_0", "process_1"]
