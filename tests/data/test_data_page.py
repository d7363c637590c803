"""What docs/data.md shows is what happens."""

import json
import pathlib
import re
import shlex

import pytest

from srft_jax.config import UsageError, parse
from srft_jax.data.sources import load_sets

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
CHAT = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\\boxed{1}"}]
}
BAD = [
    '{"prompt": "What is 17 * 3?", "answer": "51", "demonstratoins": ["51"]}',
    '{"promt": "What is 9 - 4?", "answer": 5}',
    '{"prompt": "What is 8 / 2?", "answer": null, "demonstrations": ["4", ""]}',
    '{"prompt": "What is 1 + 1?", "answer": "2"',
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Files that the page names."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("train.jsonl").write_text(blocks("json")[0])
    own = {"problem": "What is 17 * 3?", "meta": {"gold": ["51"]}, "solution": "17 * 3 = 51"}
    pathlib.Path("own.jsonl").write_text(json.dumps(own))
    pathlib.Path("chat.jsonl").write_text(json.dumps(CHAT))
    pathlib.Path("bad.jsonl").write_text("\n".join(BAD))


@pytest.mark.parametrize("block", blocks("yaml"))
def test_its_configurations_load(block):
    pathlib.Path("page.yaml").write_text(block)
    sets = load_sets(parse(["--config=page.yaml"])[1].data)
    assert sets.train and all(example.demonstrations for example in sets.train[-1:])


def test_its_rows_load():
    sets = load_sets(parse(["--data.train.files=train.jsonl"])[1].data)
    assert [example.answer for example in sets.train] == ["51", "5"]
    assert sets.train[1].metadata["difficulty"] == "easy"


@pytest.mark.parametrize(
    ("arguments", "block"),
    [
        (["--data.train.files=bad.jsonl"], 0),
        (["--data.train.files=train.jsonl", "--data.train.procedural.count=64"], 1),
        (
            [
                "--data.train.files=train.jsonl",
                "--data.evaluation.mine.files=own.jsonl",
                "--data.evaluation.mine.columns={prompt: problem, answer: meta.gold.0}",
            ],
            2,
        ),
    ],
)
def test_its_errors_are_what_is_said(arguments, block):
    with pytest.raises(UsageError) as error:
        load_sets(parse(arguments)[1].data)
    shown = re.findall(r"```\n(error: .*?)```", PAGE, re.DOTALL)[block]
    assert f"error: {error.value}".split() == shown.split()


def test_its_commands_parse(monkeypatch):
    """Paths of configurations are relative to the repository; RUN and a run's are the reader's."""
    monkeypatch.chdir(ROOT)
    for block in blocks("bash"):
        words = shlex.split(block.replace("\\\n", " "))[2:]
        words = [
            re.sub(r"RUN\.yaml|runs/mine/config\.yaml", "configs/quickstart.yaml", w) for w in words
        ]
        assert parse(words)[1].data.train is not None
