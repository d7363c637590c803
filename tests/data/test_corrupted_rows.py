"""A thousand rows of all schemas, corrupted in many ways: each is told by its number."""

import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from srft_jax.config import DataConfig, SourceConfig, UsageError
from srft_jax.data import sources

SCHEMAS = {
    "plain": {"prompt": "1+2", "answer": "3", "demonstrations": ["<think></think>3"]},
    "verl": {
        "data_source": "x",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+2"}],
        "target": [{"role": "assistant", "content": "3"}],
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "extra_info": {"index": 1},
    },
    "chat": {
        "messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}],
        "answer": "3",
    },
    "arc": {
        "question": "1+2?",
        "choices": {"text": ["3", "4"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "mmlu_pro": {"question": "1+2?", "options": ["3", "4"], "answer_index": 0},
}
# What a row of each schema cannot do without, as paths.
NEEDED = {
    "plain": [("prompt",), ("answer",)],
    "verl": [("prompt",), ("prompt", 1, "content"), ("reward_model", "ground_truth")],
    "chat": [("messages",), ("messages", 0, "role"), ("messages", 0, "content"), ("answer",)],
    "arc": [("question",), ("choices", "text"), ("answerKey",)],
    "mmlu_pro": [("question",), ("options",), ("answer_index",)],
}
NESTED = {"a": [{"b": [[None, {"c": "d"}]]}, -1.5]}
# No field takes any of these.
WRONG = (
    None,
    True,
    {},
    NESTED,
    [],
    [[]],
    [None],
    [{}],
    "",
    " \n\t",
    "\ud83d",
    [1.5, {}],
    "\udfff x",
)


def replaced(row, path, value):
    """A copy of the row with another value at the path."""
    copy = json.loads(json.dumps(row))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def removed(row, path):
    copy = replaced(row, path, None)
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


def wrong_field(rng, schema):
    return json.dumps(
        replaced(SCHEMAS[schema], rng.choice(NEEDED[schema]), rng.choice(WRONG))
    ).encode()


def missing_field(rng, schema):
    return json.dumps(removed(SCHEMAS[schema], rng.choice(NEEDED[schema]))).encode()


def not_a_row(rng, schema):
    value = rng.choice([None, 1, -1.5, True, "row", [], [SCHEMAS[schema]], {}, {"": ""}, NESTED])
    return json.dumps(value).encode()


def not_a_number(rng, schema):
    text = json.dumps(replaced(SCHEMAS[schema], rng.choice(NEEDED[schema]), "@"))
    return text.replace('"@"', rng.choice(["NaN", "Infinity", "-Infinity", "1e999"])).encode()


def cut_short(rng, schema):
    text = json.dumps(SCHEMAS[schema]).encode()
    return text[: rng.randrange(1, len(text))]


def cut_in_two(rng, schema):
    text = json.dumps(SCHEMAS[schema]).encode()
    return text[rng.randrange(1, len(text)) :]


def doubled(rng, schema):
    return json.dumps(SCHEMAS[schema]).encode() * rng.choice([2, 3])


def binary(rng, schema):
    text = bytearray(json.dumps(SCHEMAS[schema]).encode())
    text[rng.randrange(len(text))] = rng.choice([0, 0x80, 0xC0, 0xFF])
    return bytes(text).replace(b"\n", b" ")


def noise(rng, schema):
    return rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b" ").replace(b"\r", b" ")


def mark(rng, schema):
    return b"\xef\xbb\xbf" + json.dumps(SCHEMAS[schema]).encode()


def empty(rng, schema):
    return rng.choice([b"", b" ", b"\t\t", b"\r"])


def huge_number(rng, schema):
    text = json.dumps(SCHEMAS[schema] | {"@": 0})
    return text.replace('"@": 0', f'"x": {"9" * rng.choice([4301, 100_000])}').encode()


def deep(rng, schema):
    depth = rng.choice([101, 1_000, 50_000])
    left, right = rng.choice([("[", "]"), ('{"a":', "}")])
    text = json.dumps(SCHEMAS[schema] | {"@": 0})
    return text.replace('"@": 0', f'"x": {left * depth}0{right * depth}').encode()


def misspelt(rng, schema):
    return json.dumps(SCHEMAS[schema] | {"behaviour_logprobs": [-1.0]}).encode()


CORRUPTIONS = (
    *(wrong_field, missing_field, not_a_row, not_a_number, cut_short, cut_in_two, doubled, binary),
    *(noise, mark, empty, huge_number, deep, misspelt),
)


def told_rows(source):
    """Numbers of the rows that an error names."""
    with pytest.raises(UsageError) as error:
        sources.load_sets(DataConfig(train=source), shown=10**6)
    lines = str(error.value).split("\n")
    return {int(re.match(r".*?, row (\d+): .", line)[1]) for line in lines}


def test_sound_rows_of_every_schema_are_read(tmp_path):
    rows = [json.dumps(row) for row in SCHEMAS.values()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = SourceConfig(files=str(tmp_path / "rows.jsonl"))
    assert len(sources.load_sets(DataConfig(train=config)).train) == len(SCHEMAS)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_thousand_corrupted_lines(tmp_path, end):
    """Between sound rows, so that a corruption that reaches into its neighbours would show."""
    rng = random.Random(0)
    names = list(SCHEMAS)
    lines = [json.dumps(SCHEMAS["plain"]).encode()]
    bad = set()
    for number in range(1000):
        schema = names[number % len(names)]
        corruption = CORRUPTIONS[number % len(CORRUPTIONS)]
        lines.append(corruption(rng, schema))
        bad.add(len(lines))
        lines.append(json.dumps(SCHEMAS[schema]).encode())
    file = tmp_path / "rows.jsonl"
    file.write_bytes(end.join(lines))
    assert told_rows(SourceConfig(files=str(file))) == bad


@pytest.mark.parametrize("schema", SCHEMAS)
def test_corrupted_rows_of_parquet(schema, tmp_path):
    """Types are the column's, so what can be wrong is null, empty or blank."""
    rng = random.Random(1)
    rows, bad = [], set()
    for number in range(1, 201):
        row = SCHEMAS[schema]
        if number % 3 == 0:
            path = rng.choice(NEEDED[schema])
            value = row
            for key in path:
                value = value[key]
            choices = {str: [None, "", " \n"], int: [None, -1, 99], list: [None, []]}
            row = replaced(row, path, rng.choice(choices[type(value)]))
            bad.add(number)
        rows.append(row)
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    assert told_rows(SourceConfig(files=str(file))) == bad
