import json

import pytest

from srft_jax.config import JsonlConfig, UsageError
from srft_jax.data.jsonl import parse_row, read_examples, read_sets, row_problems
from srft_jax.data.sources import Example

GOOD = {"prompt": "1+2", "answer": "3"}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_rows_become_examples(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        GOOD,
        GOOD | {"demonstrations": ["a", "b"], "kind": "code"},
        GOOD | {"demonstration": "c"},
        GOOD | {"demonstrations": []},
    )
    assert read_examples(path) == (
        Example("1+2", "3"),
        Example("1+2", "3", ("a", "b"), "code"),
        Example("1+2", "3", ("c",)),
        Example("1+2", "3"),
    )


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_may_be_ended_or_not(tmp_path, end):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(GOOD) + end, newline="")
    assert read_examples(str(path)) == (Example("1+2", "3"),)


def test_text_is_utf8(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes('{"prompt": "π ≈ ?\u2028", "answer": "3"}\n'.encode())
    assert read_examples(str(path))[0].prompt == "π ≈ ?\u2028"


def test_sets_without_a_file_are_empty(tmp_path):
    train = write(tmp_path / "train.jsonl", GOOD)
    ood = write(tmp_path / "ood.jsonl", {"prompt": "4", "answer": "4"})
    sets = read_sets(JsonlConfig(train=train, ood=ood))
    assert sets.train == (Example("1+2", "3"),)
    assert sets.held_out == ()
    assert sets.ood == (Example("4", "4"),)


@pytest.mark.parametrize(
    "row, problems",
    [
        (GOOD, []),
        ([1], ["a list, but a row is an object with prompt and answer."]),
        (None, ["null, but a row is an object with prompt and answer."]),
        ({"answer": "3"}, ["'prompt' is missing."]),
        ({"prompt": "1+2"}, ["'answer' is missing."]),
        (GOOD | {"answer": 3}, ["'answer' is a number, but must be a string."]),
        (GOOD | {"answer": True}, ["'answer' is a boolean, but must be a string."]),
        (GOOD | {"prompt": None}, ["'prompt' is null, but must be a string."]),
        (GOOD | {"prompt": " \n"}, ["'prompt' is empty."]),
        (GOOD | {"answer": ""}, ["'answer' is empty."]),
        (GOOD | {"answer": "\ud83d"}, ["'answer' has half a surrogate pair as character 1."]),
        (GOOD | {"kind": 1}, ["'kind' is a number, but must be a string."]),
        (GOOD | {"promt": "x"}, ["unknown field 'promt'; did you mean 'prompt'?"]),
        (
            GOOD | {"zzz": "x"},
            [
                "unknown field 'zzz'; the fields are "
                "prompt, answer, demonstrations, demonstration, kind."
            ],
        ),
        (
            GOOD | {"demonstrations": "x"},
            ["'demonstrations' is a string, but must be a list of strings."],
        ),
        (
            GOOD | {"demonstrations": ["x", {}, ""]},
            [
                "demonstration 2 of 3 is an object, but must be a string.",
                "demonstration 3 of 3 is empty.",
            ],
        ),
        (
            GOOD | {"demonstration": ["x"]},
            ["'demonstration' is a list, but must be a string."],
        ),
        (
            GOOD | {"demonstration": "x", "demonstrations": ["x"]},
            ["both 'demonstrations' and 'demonstration'; give one of them."],
        ),
        ({"answer": 3}, ["'prompt' is missing.", "'answer' is a number, but must be a string."]),
    ],
)
def test_every_problem_of_a_row(row, problems):
    assert row_problems(row) == problems


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"prompt": "1"', "not JSON: Expecting ',' delimiter in column 15."),
        (b"", "not JSON: Expecting value in column 1."),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff in column 13."),
    ],
)
def test_lines_that_are_not_json(line, problem):
    assert parse_row(line) == (None, [problem])


def test_problems_name_file_and_row_in_order(tmp_path):
    path = write(tmp_path / "train.jsonl", GOOD, {"prompt": "1"}, GOOD, "{", GOOD, "", GOOD)
    with pytest.raises(UsageError) as error:
        read_examples(path)
    assert str(error.value).split("\n") == [
        f"{path}, row 2: 'answer' is missing.",
        f"{path}, row 4: not JSON: Expecting property name enclosed in double quotes in column 2.",
        f"{path}, row 6: not JSON: Expecting value in column 1.",
    ]


@pytest.mark.parametrize("bad, last", [(10, "row 10: not JSON"), (12, "... and 2 more.")])
def test_ten_problems_are_shown_and_the_others_counted(tmp_path, bad, last):
    path = write(tmp_path / "train.jsonl", *["["] * bad)
    with pytest.raises(UsageError) as error:
        read_examples(path)
    lines = str(error.value).split("\n")
    assert len(lines) == min(bad, 11)
    assert last in lines[-1]


def test_a_file_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(UsageError, match="missing.jsonl cannot be read: No such file"):
        read_examples(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UsageError, match="empty.jsonl is empty"):
        read_examples(write(tmp_path / "empty.jsonl"))
