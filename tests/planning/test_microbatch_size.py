"""training.rows_per_microbatch: auto chooses what fits, by XLA's accounting of the real step."""

import dataclasses
from types import SimpleNamespace

import pytest
from dry_plan import dry_plan
from tiny_runs import assert_same_run, run_in_process, tiny_config

from srft_jax.config import UsageError, parse, to_yaml
from srft_jax.planning.microbatch_size import step_mib
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.planned import planned, with_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

AUTO = "--training.rows_per_microbatch=auto"


def needs(mib, most=1024):
    """A train step that needs so many MiB a row, and does not compile beyond a number of rows."""

    def needed_mib(run):
        rows = run.training.rows
        return float("inf") if rows > most else mib * rows

    return needed_mib


def chosen(tmp_path, *arguments, needed_mib=step_mib):
    setup, line = with_rows(prepare(tiny_config(tmp_path / "run", AUTO, *arguments)), needed_mib)
    return setup.config.training.rows, line


# A step of the tiny run has 16 sequences, each of half a row.
@pytest.mark.parametrize(("memory", "rows"), [(10, 1), (39, 2), (40, 4), (79, 4), (900, 16)])
def test_the_most_rows_that_fit(memory, rows, tmp_path):
    number, line = chosen(tmp_path, f"--training.memory_mib={memory}", needed_mib=needs(10))
    assert number == rows and f"= {rows}: of {memory} MiB" in line


def test_what_xla_refuses_to_compile_does_not_fit(tmp_path):
    memory = "--training.memory_mib=1000"
    assert chosen(tmp_path, memory, needed_mib=needs(10, most=2))[0] == 2


def test_nothing_fits(tmp_path):
    with pytest.raises(UsageError, match="of 5 MiB on each device 1 rows need 10"):
        chosen(tmp_path, "--training.memory_mib=5", needed_mib=needs(10))


def test_a_device_that_does_not_say_what_it_has(tmp_path):
    with pytest.raises(UsageError, match="needs training.memory_mib: a cpu device"):
        chosen(tmp_path)


def test_a_plan_chooses_as_a_run_does(tmp_path):
    flags = ("--objective.preset=sft", "--plan.topology=cpu:1", "--training.num_steps=1")
    config = tiny_config(tmp_path / "run", AUTO, *flags)
    # Nine tenths of a fake device's memory are 3,686 MiB.
    ((run, _),), _ = dry_plan(config, needed_mib=needs(900))
    assert run.training.rows_per_microbatch == 4


@pytest.mark.slow
def test_more_rows_need_more_memory(tmp_path):
    run = planned(prepare(tiny_config(tmp_path / "run", AUTO)))
    few, many = (step_mib(run.with_rows(rows)) for rows in (2, 64))
    assert 0.1 < few < 0.5 * many


def test_rows_that_another_mesh_cannot_split_are_refused(tmp_path):
    stored = tiny_config(tmp_path / "run", "--training.rows_per_microbatch=2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(stored))
    setup = prepare(tiny_config(tmp_path / "run", AUTO))
    assert with_rows(setup)[0].config.training.rows == 2
    larger = SimpleNamespace(shape=setup.mesh.shape | {"fsdp": 4}, devices=setup.mesh.devices)
    with pytest.raises(UsageError, match="rows_per_microbatch = 2 does not split over the 4"):
        with_rows(dataclasses.replace(setup, mesh=larger))


@pytest.mark.slow
def test_a_run_keeps_the_number_it_was_started_with(tmp_path):
    flags = [AUTO, "--training.num_steps=2", "--evaluation.every=0"]
    assert run_in_process(tmp_path / "run", *flags, "--training.memory_mib=4096") == 0
    stored = parse([f"--config={tmp_path}/run/config.yaml"])[1]
    assert stored.training.rows_per_microbatch == 16  # one microbatch holds a whole update
    # With less memory another run would choose fewer rows; this one goes on as it is.
    less = "--training.memory_mib=1"
    assert chosen(tmp_path / "another", less)[0] < 16  # 16 rows need 1.9 MiB
    assert run_in_process(tmp_path / "run", *flags, less) == 0
    given = ["--training.rows_per_microbatch=16", *flags[1:]]
    assert run_in_process(tmp_path / "given", *given) == 0
    assert_same_run(tmp_path / "run", tmp_path / "given")
