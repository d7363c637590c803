"""Tiny runs, and what two of them must have in common."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import run
from srft_jax.config import parse
from srft_jax.models.hf_config import read_config, to_hf_config
from srft_jax.models.hf_json import write_json
from srft_jax.planning.train_program import train_state
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.planned import planned
from srft_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
# Flags for a run on files of its own: without the problems of tiny.yaml.
NO_PROBLEMS = ("--data.train.procedural=null", "--data.evaluation={}")
MAY_DIFFER = ("time/", "perf/")
TINY_ARCHITECTURE = Path(__file__).parent / "architectures" / "tiny"


def tiny_arguments(run_dir, *arguments):
    """Command line of the tiny run, from anywhere."""
    tokenizer = ROOT / "assets" / "tokenizer"
    tiny = Path(__file__).parent / "tiny.yaml"
    return [
        f"--config={tiny}",
        f"--model.architecture={TINY_ARCHITECTURE}",
        f"--model.tokenizer={tokenizer}",
        f"--run_dir={run_dir}",
        *arguments,
    ]


def tiny_config(run_dir, *arguments):
    return parse(tiny_arguments(run_dir, *arguments))[1]


def tiny_model():
    """Architecture of the tiny run."""
    return read_config(TINY_ARCHITECTURE)


def changed_architecture(directory, **fields):
    """Flag for the tiny run's architecture with other fields, whose config.json it writes."""
    directory.mkdir(parents=True, exist_ok=True)
    changed = dataclasses.replace(tiny_model(), **fields)
    write_json(directory / "config.json", to_hf_config(changed))
    return f"--model.architecture={directory}"


def scored_by_parity(path):
    """Flags for nine prompts, all with a demonstration, whose rewards are 0 and 1 equally often."""
    rows = [
        dict(
            prompt=f"{i}+1",
            answer=f"{i + 1}",
            demonstration=f"<think>{i}+1</think>{i + 1}",
            kind="tiny_scorers:parity",
        )
        for i in range(9)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*NO_PROBLEMS, f"--data.train.files={path}/rows.jsonl"]


def run_in_process(run_dir, *arguments):
    """Exit code of the tiny run."""
    return run.main(["train", *tiny_arguments(run_dir, *arguments)])


def metrics_lines(run_dir):
    """metrics.jsonl without what may differ between two runs of a seed."""
    rows = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    kept = [{k: v for k, v in row.items() if not k.startswith(MAY_DIFFER)} for row in rows]
    return [row for row in kept if row.keys() != {"step"}]


def samples(run_dir):
    return (Path(run_dir) / "samples.jsonl").read_text()


def newest_checkpoint(run_dir):
    """Step, every array of the train state by its path, and the place in the data."""
    config = parse([f"--config={run_dir}/config.yaml"])[1]
    with Checkpoints(str(run_dir), config.training.keep_checkpoints) as checkpoints:
        step = checkpoints.newest()
        state, data = checkpoints.restore(step, train_state(planned(prepare(config))))
    leaves = jax.tree.leaves_with_path(state)
    return step, {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}, data


def assert_same_run(run_dir, other):
    """Bit for bit: records, parameters, optimizer states, running statistics, data order."""
    assert metrics_lines(run_dir) == metrics_lines(other)
    assert samples(run_dir) == samples(other)
    (step, arrays, data), (other_step, other_arrays, other_data) = (
        newest_checkpoint(one) for one in (run_dir, other)
    )
    assert (step, data) == (other_step, other_data)
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        assert array.tobytes() == other_arrays[name].tobytes(), name
