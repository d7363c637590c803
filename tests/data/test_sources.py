import dataclasses
import importlib.util
import json
import pathlib

import pytest

from srft_jax.config import ArithmeticConfig, DataConfig, JsonlConfig, UsageError
from srft_jax.data import arithmetic, jsonl
from srft_jax.data.sources import Example, ExampleSets, check_disjoint, load_sets

ASSETS = pathlib.Path(__file__).parents[2] / "assets"
ARITHMETIC = ArithmeticConfig(num_train=20, num_demonstrated=5, num_held_out=8, num_ood=6)


def shipped():
    return JsonlConfig(
        train=str(ASSETS / "arithmetic.jsonl"),
        held_out=str(ASSETS / "arithmetic_held_out.jsonl"),
        ood=str(ASSETS / "arithmetic_ood.jsonl"),
    )


def write(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts))
    return str(path)


def test_the_configured_source_is_loaded():
    assert load_sets(DataConfig(arithmetic=ARITHMETIC)) == arithmetic.make_sets(ARITHMETIC)
    assert load_sets(DataConfig(jsonl=shipped())) == jsonl.read_sets(shipped())


def test_exactly_one_source_is_set():
    with pytest.raises(UsageError, match="exactly one .* neither is set"):
        load_sets(DataConfig())
    with pytest.raises(UsageError, match="exactly one .* both are set"):
        load_sets(DataConfig(arithmetic=ARITHMETIC, jsonl=shipped()))


def test_an_overlap_names_the_prompt_and_both_places(tmp_path):
    files = JsonlConfig(
        train=write(tmp_path / "train.jsonl", "a", "b", "c", "b"),
        held_out=write(tmp_path / "held_out.jsonl", "d", "e", " b"),
        ood=write(tmp_path / "ood.jsonl", "d"),
    )
    with pytest.raises(UsageError) as error:
        load_sets(DataConfig(jsonl=files))
    assert str(error.value).split("\n") == [
        f"The prompt 'b' stands in both train ({files.train}, row 2) and held_out "
        f"({files.held_out}, row 3); the sets must not overlap.",
        f"The prompt 'd' stands in both held_out ({files.held_out}, row 1) and ood "
        f"({files.ood}, row 1); the sets must not overlap.",
    ]
    load_sets(DataConfig(jsonl=dataclasses.replace(files, held_out=None)))


def test_the_same_prompt_twice_in_one_set_is_no_overlap():
    a, b = Example("a", "1"), Example("b", "1")
    names = {"train": "row", "held_out": "row", "ood": "row"}
    check_disjoint(ExampleSets(train=(a, a), held_out=(b, b), ood=()), names)
    with pytest.raises(UsageError, match=r"'a' stands in both train \(row 1\) and ood \(row 2\)"):
        check_disjoint(ExampleSets(train=(a, a), held_out=(), ood=(b, a)), names)


def test_the_shipped_files_are_what_their_script_makes():
    spec = importlib.util.spec_from_file_location("make_jsonl", ASSETS / "make_jsonl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.contents().items():
        assert (ASSETS / name).read_text() == text, f"run python -m assets.make_jsonl for {name}"
    sets = load_sets(DataConfig(jsonl=shipped()))
    assert [len(examples) for examples in vars(sets).values()] == [600, 512, 256]
    assert sum(len(example.demonstrations) for example in sets.train) == 100
    assert sum((ASSETS / name).stat().st_size for name in module.contents()) < 200_000


def test_the_shipped_files_do_not_leak_into_the_default_problems():
    default = arithmetic.make_sets(ArithmeticConfig())
    files = load_sets(DataConfig(jsonl=shipped()))
    assert not {x.prompt for x in default.train} & {x.prompt for x in files.held_out}
    assert not {x.prompt for x in files.train} & {x.prompt for x in default.held_out}
