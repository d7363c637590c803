"""From the configuration to the sets: every way in, mixtures, limits, and what sets may share."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest

from srft_jax.config import DataConfig, ProceduralConfig, SourceConfig, UsageError, parse
from srft_jax.data import procedural
from srft_jax.data.examples import Example, SourceRows, Turn
from srft_jax.data.sources import check_held_out, load_sets

ROOT = pathlib.Path(__file__).parents[2]
ASSETS = ROOT / "assets"
PROBLEMS = ProceduralConfig(count=20, demonstrated=5)


def shipped():
    return DataConfig(
        train=SourceConfig(files=str(ASSETS / "arithmetic.jsonl")),
        evaluation={
            "held_out": SourceConfig(files=str(ASSETS / "arithmetic_held_out.jsonl")),
            "ood": SourceConfig(files=str(ASSETS / "arithmetic_ood.jsonl")),
        },
    )


def write(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    return SourceConfig(files=str(path))


def prompts(examples):
    return [example.prompt for example in examples]


def test_every_set_has_its_source_and_its_rows_are_counted(tmp_path):
    sets = load_sets(
        DataConfig(
            train=SourceConfig(procedural=PROBLEMS),
            evaluation={
                "held_out": write(tmp_path / "held_out.jsonl", "a"),
                "off": None,
                "aime24": write(tmp_path / "aime.jsonl", "b", "c"),
            },
        )
    )
    assert sets.train == procedural.load_procedural(PROBLEMS, "train")
    assert {name: prompts(examples) for name, examples in sets.evaluation.items()} == {
        "held_out": ["a"],
        "aime24": ["b", "c"],
    }
    assert sets.rows == (
        SourceRows("data.train", 20, 20),
        SourceRows("data.evaluation.held_out", 1, 1),
        SourceRows("data.evaluation.aime24", 2, 2),
    )


def test_exactly_one_training_source_is_set(tmp_path):
    with pytest.raises(UsageError, match="exactly one of .* neither is"):
        load_sets(DataConfig())
    source = write(tmp_path / "a.jsonl", "a")
    with pytest.raises(UsageError, match="exactly one of .* both are"):
        load_sets(DataConfig(train=source, mixture=[source]))


def test_a_mixture_numbers_its_sources(tmp_path):
    weighted = dataclasses.replace(write(tmp_path / "b.jsonl", "b", "c"), weight=2.0)
    generated = SourceConfig(procedural=ProceduralConfig(count=1))
    sets = load_sets(DataConfig(mixture=[write(tmp_path / "a.jsonl", "a"), weighted, generated]))
    assert prompts(sets.train[:3]) == ["a", "b", "c"]
    assert [example.source for example in sets.train] == [0, 1, 1, 2]
    assert [rows.source for rows in sets.rows] == [f"data.mixture[{i}]" for i in range(3)]


def test_limit_and_distinct(tmp_path):
    source = write(tmp_path / "a.jsonl", "a", "b", "a", "c", "d")
    distinct = dataclasses.replace(source, distinct=True)
    first = dataclasses.replace(distinct, limit=3)
    for config, kept, read in ((source, "abacd", 5), (distinct, "abcd", 5), (first, "abc", 4)):
        sets = load_sets(DataConfig(train=config))
        assert prompts(sets.train) == list(kept)
        assert sets.rows == (SourceRows("data.train", read, len(kept)),)


def test_the_instruction_follows_the_prompt_and_hides_no_overlap(tmp_path):
    train = dataclasses.replace(write(tmp_path / "a.jsonl", "a"), instruction="Think.")
    assert prompts(load_sets(DataConfig(train=train)).train) == ["a\nThink."]
    with pytest.raises(UsageError, match="stands in both train .* and held_out"):
        load_sets(
            DataConfig(train=train, evaluation={"held_out": write(tmp_path / "b.jsonl", "a")})
        )


def test_an_overlap_names_the_prompt_and_both_places(tmp_path):
    config = DataConfig(
        train=write(tmp_path / "train.jsonl", "a", "b", "c", "b"),
        evaluation={
            "held_out": write(tmp_path / "held_out.jsonl", "d", "e", " b"),
            "aime24": write(tmp_path / "aime.jsonl", "d" * 99, "d", "c"),
        },
    )
    with pytest.raises(UsageError) as error:
        load_sets(config)
    assert str(error.value).split("\n") == [
        f"The prompt 'b' stands in both train ({tmp_path}/train.jsonl, row 2) and held_out "
        f"({tmp_path}/held_out.jsonl, row 3); what is trained on cannot be evaluated.",
        f"The prompt 'c' stands in both train ({tmp_path}/train.jsonl, row 3) and aime24 "
        f"({tmp_path}/aime.jsonl, row 3); what is trained on cannot be evaluated.",
    ]


def test_training_rows_that_are_evaluated_can_be_dropped(tmp_path):
    """Rows of every source of a mixture go, as its number of used rows shows."""
    config = DataConfig(
        mixture=[
            write(tmp_path / "a.jsonl", "a", "b"),
            write(tmp_path / "c.jsonl", "c", " b", "d"),
        ],
        evaluation={
            "held_out": write(tmp_path / "held_out.jsonl", "b"),
            "ood": write(tmp_path / "ood.jsonl", "d", "b"),
        },
    )
    with pytest.raises(UsageError, match="stands in both train .* and held_out"):
        load_sets(config)
    sets = load_sets(dataclasses.replace(config, overlap="drop"))
    assert prompts(sets.train) == ["a", "c"]
    assert prompts(sets.evaluation["ood"]) == ["d", "b"]
    assert [(rows.read, rows.used) for rows in sets.rows] == [(2, 1), (3, 1), (1, 1), (2, 2)]


def test_evaluation_sets_may_share_prompts(tmp_path):
    """AMC in a collection of competitions; problems of one family in held_out and ood."""
    sums = ProceduralConfig(family="sums", min_size=2, max_size=2, count=500)
    config = DataConfig(
        train=SourceConfig(procedural=dataclasses.replace(sums, count=20)),
        evaluation={
            "held_out": SourceConfig(procedural=sums),
            "ood": SourceConfig(procedural=dataclasses.replace(sums, seed=1)),
        },
    )
    sets = load_sets(config).evaluation
    shared = set(prompts(sets["held_out"])) & set(prompts(sets["ood"]))
    assert 0 < len(shared) < 500


def test_evaluation_sets_keep_their_whole_names(tmp_path):
    """Two that end alike are two sets."""
    named = {
        "amc.2023": write(tmp_path / "a.jsonl", "a"),
        "aime.2023": write(tmp_path / "b.jsonl", "b"),
    }
    sets = load_sets(DataConfig(train=write(tmp_path / "t.jsonl", "t"), evaluation=named))
    assert {name: prompts(some) for name, some in sets.evaluation.items()} == {
        "amc.2023": ["a"],
        "aime.2023": ["b"],
    }


def test_what_is_no_overlap():
    """The same prompt twice in one set, and the same last words of two conversations."""
    a, b = Example("a", "1"), Example("b", "1")
    check_held_out({"train": [a, a], "held_out": [b]})
    later = Example("a", "1", history=(Turn("user", "b"), Turn("assistant", "c")))
    check_held_out({"train": [a], "held_out": [later]})
    system = Example("a ", "1", history=(Turn("system", "b"),))
    with pytest.raises(UsageError, match=r"both train \(example 1\) and ood \(example 2\)"):
        check_held_out({"train": [a], "held_out": [], "ood": [b, system]})


def test_problems_of_all_sources_are_told_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "1", "answer": "1"}\n[]\n')
    with pytest.raises(UsageError) as error:
        load_sets(
            DataConfig(
                train=SourceConfig(files=str(tmp_path / "a.jsonl")),
                evaluation={"held_out": SourceConfig(files=str(tmp_path / "b.jsonl"))},
            )
        )
    assert str(error.value).split("\n") == [
        f"{tmp_path}/a.jsonl, row 1: 'answer' is missing; the row has prompt, see `columns`.",
        f"{tmp_path}/b.jsonl, row 2: a list, but a row is an object with prompt and answer.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"procedural": PROBLEMS}, "data.train must have exactly one of .* files and procedural"),
        ({"files": None}, "data.train must have exactly one of .* but has none"),
        ({"limit": 0}, "data.train.limit = 0 is not at least 1"),
        ({"weight": 0.0}, "data.train.weight = 0.0 is not above 0"),
        ({"weight": 2.0}, "data.train.weight = 2.0 weighs nothing outside data.mixture"),
        (
            {"columns": {"promt": "q"}},
            "data.train.columns: 'promt' is not .* did you mean 'prompt'",
        ),
        ({"columns": {"prompt": "q"}}, "data.train.columns has a prompt, but no answer"),
        ({"files": None, "procedural": PROBLEMS, "kind": "math"}, "data.train.kind is of files"),
    ],
)
def test_impossible_sources(change, message, tmp_path):
    source = dataclasses.replace(write(tmp_path / "a.jsonl", "a"), **change)
    with pytest.raises(UsageError, match=message):
        load_sets(DataConfig(train=source))


def test_the_shipped_files_are_what_their_script_makes():
    spec = importlib.util.spec_from_file_location("make_jsonl", ASSETS / "make_jsonl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.contents().items():
        assert (ASSETS / name).read_text() == text, f"run python -m assets.make_jsonl for {name}"
    sets = load_sets(shipped())
    assert [rows.used for rows in sets.rows] == [600, 512, 256]
    assert sum(len(example.demonstrations) for example in sets.train) == 100
    assert sum((ASSETS / name).stat().st_size for name in module.contents()) < 200_000


def test_the_shipped_files_do_not_leak_into_the_quickstart():
    quickstart = load_sets(parse([f"--config={ROOT}/configs/quickstart.yaml"])[1].data)
    files = load_sets(shipped())
    for one, other in ((quickstart, files), (files, quickstart)):
        held_out = set(prompts(other.evaluation["held_out"]))
        assert len(held_out) == 512 and not held_out & set(prompts(one.train))
    assert len(quickstart.train) == 1024


def test_golden_problems():
    """If this moves, every recorded result of the quickstart is of other data."""
    sets = load_sets(parse([f"--config={ROOT}/configs/quickstart.yaml"])[1].data)
    first = [examples[0].prompt for examples in (sets.train, *sets.evaluation.values())]
    assert first == ["3*2-7+0", "4-4*3*6", "0+7+1+9-7"]
    assert [bool(x.demonstrations) for x in sets.train] == [True] * 64 + [False] * 960
