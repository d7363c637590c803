"""Traces of chosen steps can be read, and say which phases they saw."""

import jax
import pytest
from tiny_runs import run_in_process, tiny_config

from srft_jax.host.profiler import Profiler


def names_in(file):
    """Of all events, and of the operations' scopes."""
    found = set()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                found.add(event.name)
    return found


@pytest.mark.slow
def test_chosen_steps_are_traced(tmp_path):
    assert run_in_process(tmp_path / "run", "--training.profile_steps=[2, 3]") == 0
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"step_2", "step_3"}
    for step in ("step_2", "step_3"):  # where TensorBoard's page looks
        (file,) = folder.glob(f"{step}/plugins/profile/*/*.xplane.pb")
        assert {"step", "rollout", "train"} <= names_in(file)


def test_processes_of_one_machine_do_not_overwrite_each_other(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", "--training.profile_steps=[2]")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with Profiler(config) as profiler:
            profiler.begin(2)
    found = (tmp_path / "run" / "profile").glob("step_2/*/plugins/profile/*/*.xplane.pb")
    assert sorted(path.parts[-5] for path in found) == ["process_0", "process_1"]
