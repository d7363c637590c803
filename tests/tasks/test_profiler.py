"""Traces of chosen steps can be read, and say which phases they saw."""

import jax
from tiny_runs import run_in_process


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
