"""A run says how many rows each source had, and how many of them it uses."""

import json

from tiny_runs import NO_PROBLEMS, tiny_config

from srft_jax.tasks.setup import prepare
from srft_jax.tasks.summary import batch_arithmetic


def test_rows_of_a_source_are_counted(tmp_path):
    rows = [{"prompt": f"{n % 6}+1", "answer": "1", "demonstration": "1"} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"--data.train.files={tmp_path}/a.jsonl", "--data.train.distinct=true")
    benchmark = f"--data.benchmarks.mine.files={tmp_path}/b.jsonl"
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "9+9", "answer": "8"}))
    setup = prepare(tiny_config(tmp_path / "run", *NO_PROBLEMS, *files, benchmark))
    said = [" ".join(line.split()) for line in batch_arithmetic(setup, {}, {}).splitlines()]
    assert "data.train 20 rows read, 6 used" in said
    assert "data.benchmarks.mine 1 rows read, 1 used" in said
    assert setup.evaluation_sets.keys() == {"mine"}
