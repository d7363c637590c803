"""JSONL, JSON and Parquet: files, folders and globs, and what becomes of values that JSON lacks."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest

from srft_jax.config import DataConfig, SourceConfig, UsageError
from srft_jax.data.sources import load_sets

GOOD = {"prompt": "1+2", "answer": "3"}


def load(path, **source):
    return load_sets(DataConfig(train=SourceConfig(files=str(path), **source))).train


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def parquet(path, columns, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path, row_group_size=2)
    return path


def message(path, **source):
    with pytest.raises(UsageError) as error:
        load(path, **source)
    return str(error.value).split("\n")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_an_editor_may_mark_the_start_and_end_lines_its_own_way(tmp_path, start, end):
    file = tmp_path / "train.jsonl"
    file.write_text(start + json.dumps(GOOD) + end, newline="")
    (example,) = load(file)
    assert (example.prompt, example.answer) == ("1+2", "3")


def test_text_is_utf8(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes('{"prompt": "π ≈ ?\u2028", "answer": "3", "x": NaN, "y": 1e999}\n'.encode())
    (example,) = load(file)
    assert example.prompt == "π ≈ ?\u2028"
    assert example.metadata == {"prompt": "π ≈ ?\u2028", "answer": "3", "x": None, "y": None}


def test_files_folders_and_globs_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.json", "sub/e.jsonl"):
        lines(tmp_path / "data" / name, GOOD | {"prompt": name})
    parquet(tmp_path / "data" / "d.parquet", {"prompt": ["d1", "d2", "d3"], "answer": ["1"] * 3})
    (tmp_path / "data" / "README.md").write_text("not data")

    def prompts(path):
        return [example.prompt for example in load(path)]

    folder = ["a.jsonl", "b.jsonl", "c.json", "d1", "d2", "d3"]
    assert prompts(tmp_path / "data") == folder
    assert prompts(tmp_path / "data" / "*.jsonl") == folder[:2]
    assert prompts(tmp_path / "d*" / "[a-c].*") == folder[:3]
    assert prompts(tmp_path / "*" / "*" / "*.jsonl") == ["sub/e.jsonl"]
    wheres = [example.where for example in load(tmp_path / "data" / "d.parquet")]
    assert wheres == [f"{tmp_path}/data/d.parquet, row {n}" for n in (1, 2, 3)]


def test_a_json_file_may_hold_one_list(tmp_path):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([GOOD, {"prompt": "4"}, 5], indent=2))
    assert message(file) == [
        f"{file}, row 2: 'answer' is missing; the row has prompt, see `columns`.",
        f"{file}, row 3: a number, but a row is an object with prompt and answer.",
    ]
    file.write_text(json.dumps([GOOD, GOOD]))
    assert len(load(file)) == 2
    file.write_text("[\n" + json.dumps(GOOD))
    assert message(file) == [f"{file}: not JSON: Expecting ',' delimiter in line 2, column 33."]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "1"', "not JSON: Expecting ',' delimiter in column 15."),
        (b"  ", "an empty line, but a row is an object."),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff in column 13."),
        (b'\xef\xbb\xbf{"prompt": "1"}', "not JSON: Expecting value in column 1."),
        (b'{"prompt": "a", "x": {"b": 1, "b": 2}}', "'b' is there twice in one object."),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "a number has too many digits."),
        (b"[" * 150 + b"]" * 150, "nested deeper than 100 levels."),
        (b"[" * 99_999 + b"]" * 99_999, "nested deeper than 100 levels."),
        (b'{"a":' * 99_999, "nested deeper than 100 levels."),
    ],
    ids=range(9),
)
def test_lines_that_are_no_rows(tmp_path, line, problem):
    file = tmp_path / "train.jsonl"
    good = json.dumps(GOOD).encode()
    file.write_bytes(good + b"\n" + line + b"\n" + good)
    (told,) = message(file)
    assert told.startswith(f"{file}, row 2: {problem}")


@pytest.mark.parametrize(("bad", "last"), [(10, "row 10: not JSON"), (12, "... and 2 more.")])
def test_ten_problems_are_shown_and_the_others_counted(tmp_path, bad, last):
    told = message(lines(tmp_path / "train.jsonl", *["["] * bad))
    assert len(told) == min(bad, 11)
    assert last in told[-1]


def test_files_that_cannot_be_read(tmp_path):
    assert message(tmp_path / "no.jsonl")[0].endswith(
        "no.jsonl cannot be read: No such file or directory."
    )
    empty = lines(tmp_path / "empty.jsonl")
    assert message(empty) == [f"data.train is empty: {empty} has no rows."]
    assert (
        "holds no file that ends in .jsonl or .json or .parquet" in message(tmp_path / "*.csv?")[0]
    )
    assert "** is not understood" in message(tmp_path / "**" / "*.jsonl")[0]
    csv = lines(tmp_path / "data.csv", "a,b")
    assert message(csv) == [f"data.train.files: {csv} ends in none of .jsonl, .json, .parquet."]
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    assert "broken.parquet cannot be read as Parquet: " in message(broken)[0]
    whole = parquet(tmp_path / "whole.parquet", {"prompt": ["1" * 99] * 999, "answer": ["1"] * 999})
    content = bytearray(whole.read_bytes())
    content[20:400] = bytes(380)
    whole.write_bytes(content)
    assert "whole.parquet cannot be read as Parquet: " in message(whole)[0]


def test_values_that_json_lacks(tmp_path):
    day = datetime.date(2024, 1, 31)
    columns = {
        "prompt": ["1+2"],
        "answer": pyarrow.array([3], pyarrow.int8()),
        "day": [day],
        "time": [datetime.datetime(2024, 1, 31, 12, 30)],
        "span": [datetime.timedelta(seconds=90)],
        "blob": [b"\xff\x00"],
        "price": [decimal.Decimal("1.50")],
        "half": pyarrow.array([1.5], pyarrow.float16()),
        "nan": [float("nan")],
        "nested": [{"list": [1.0, float("inf")], "day": day}],
        "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "category": pyarrow.array(["x"]).dictionary_encode(),
    }
    (example,) = load(parquet(tmp_path / "a.parquet", columns))
    assert example.answer == "3"
    assert example.metadata == {
        "prompt": "1+2",
        "answer": 3,
        "day": "2024-01-31",
        "time": "2024-01-31T12:30:00",
        "span": 90.0,
        "blob": "/wA=",
        "price": "1.50",
        "half": 1.5,
        "nan": None,
        "nested": {"list": [1.0, None], "day": "2024-01-31"},
        "map": [["a", 1]],
        "category": "x",
    }
    json.dumps(example.metadata)


def test_a_row_of_parquet_that_python_cannot_hold(tmp_path):
    """Text that is not UTF-8, and a date before the year 1; the rows beside them are sound."""
    bad = pyarrow.array([b"1+2", b"\xff", b"3"]).cast(pyarrow.binary())
    prompts = pyarrow.StringArray.from_buffers(3, *bad.buffers()[1:])
    days = pyarrow.array([0, 0, -1_000_000], pyarrow.int32()).view(pyarrow.date32())
    file = parquet(tmp_path / "a.parquet", {"prompt": prompts, "answer": ["1"] * 3, "day": days})
    first, second = message(file)
    assert first.startswith(f"{file}, row 2: 'prompt' cannot be read: ")
    assert second.startswith(f"{file}, row 3: 'day' cannot be read: ")
