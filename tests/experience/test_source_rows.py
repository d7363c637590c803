"""A run says how many rows each source had, and how many of them it uses."""

import dataclasses
import json
import re

from tiny_runs import NO_PROBLEMS, tiny_config

from srft_jax.experience.demonstrations import all_demonstrations, describe_demonstrations
from srft_jax.report.summary import data_rows
from srft_jax.setup.prepare import prepare


def test_rows_of_a_source_are_counted(tmp_path):
    rows = [{"prompt": f"{n % 6}+1", "answer": "1", "demonstration": "1"} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"--data.train.files={tmp_path}/a.jsonl", "--data.train.distinct=true")
    benchmark = f"--data.evaluation.mine.files={tmp_path}/b.jsonl"
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "9+9", "answer": "8"}))
    setup = prepare(tiny_config(tmp_path / "run", *NO_PROBLEMS, *files, benchmark))
    said = [" ".join(row) for row in data_rows(setup.data)]
    assert "data.train 20 rows read, 6 used" in said
    assert "data.evaluation.mine 1 rows read, 1 used" in said
    assert setup.data.evaluation.keys() == {"mine"}


def test_a_wrong_demonstration_is_named_by_its_row(tmp_path):
    """As it stands in the file, not among the rows that are left."""
    rows = [{"prompt": p, "answer": "1", "demonstration": "<think></think>1"} for p in "1122345"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"--data.train.files={tmp_path}/a.jsonl", "--data.train.distinct=true")
    setup = prepare(tiny_config(tmp_path / "run", *NO_PROBLEMS, *files))
    train = setup.data.train
    (index,) = (i for i, one in enumerate(train) if one.example.prompt == "3")
    given = all_demonstrations(train)
    scored = {
        (0, 0): dataclasses.replace(given[0, 0], correct=True, verdict="right"),
        (index, 0): dataclasses.replace(given[index, 0], verdict="wrong"),
    }
    first, warning = describe_demonstrations(scored, train)
    assert first == "demonstrations verified right: 1 of 2"
    assert re.match(rf"WARNING: {tmp_path}/a.jsonl, row 5: the verdict of final_answer on", warning)
