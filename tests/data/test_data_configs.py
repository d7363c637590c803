"""Every file in configs/data/ reads rows with the columns of its repositories, in their layout.

The rows are made up; names, columns and types are those of the repositories on the hub.
"""

import csv
import json
import pathlib
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from srft_jax.config import UsageError, parse
from srft_jax.data.sources import load_sets
from srft_jax.rewards.verifiers import KINDS, columns_of

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "data").iterdir())


def verl(prompt, system, style, **columns):
    turns = [{"content": "Think.", "role": "system"}] if system else []
    return {
        "data_source": "x",
        "prompt": [*turns, {"content": prompt, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": "34", "style": style},
        "extra_info": {"index": "9a9b"},
        **columns,
    }


def gsm8k(question):
    return {"question": question, "answer": "17 * 2 = <<17*2=34>>34\n#### 34"}


def problem(name, answer="34", **columns):
    return {"problem": name, "answer": answer, **columns}


def options(name, **columns):
    return {"question": name, "question_id": 1, "category": "x", **columns}


TARGET = [{"content": "<think>\n17 * 2\n</think>\n\\boxed{34}", "role": "assistant"}]
MATH = {"problem": "c", "level": "Level 5", "type": "Algebra", "solution": r"so \boxed{34}."}
OLYMPIAD = {"id": 1, "question": "j", "solution": ["so"], "final_answer": ["34"], "unit": None}
ARC = {"id": "x", "question": "k", "choices": {"text": ["1", "34"], "label": ["1", "2"]}}
GPQA = {"Record ID": "x", "Question": "l", "Correct Answer": "34 m\n"} | {
    f"Incorrect Answer {i}": str(i) for i in (1, 2, 3)
}
MMLU_PRO = {"options": ["1", "34", "3"], "answer": "B", "answer_index": 1, "cot_content": ""}

# Repository -> file -> rows.
REPOSITORIES = {
    "Elliott/Openr1-Math-46k-8192": {
        "data/train-00000-of-00002.parquet": [verl("a", True, "rule", target=TARGET)],
        "data/train-00001-of-00002.parquet": [verl("a2", True, "rule", target=TARGET)],
    },
    "openai/gsm8k": {
        "main/train-00000-of-00001.parquet": [gsm8k("b")],
        "main/test-00000-of-00001.parquet": [gsm8k("b2")],
        "socratic/train-00000-of-00001.parquet": [gsm8k("b3")],
    },
    "DigitalLearningGmbH/MATH-lighteval": {"data/train-00000-of-00001.parquet": [MATH]},
    "BytedTsinghua-SIA/DAPO-Math-17k": {
        "data/dapo-math-17k.parquet": [verl("d", False, "rule-lighteval/MATH_v2")] * 3,
    },
    "HuggingFaceH4/aime_2024": {
        "data/train-00000-of-00001.parquet": [problem("e", solution="so", year="2024")]
    },
    "math-ai/aime25": {"test.jsonl": [problem("f", id="0")]},
    "AI-MO/aimo-validation-amc": {
        "data/train-00000-of-00001.parquet": [problem("g", 34.0, url="x")]
    },
    "HuggingFaceH4/MATH-500": {"test.jsonl": [problem("h", solution="so", level=5)]},
    "math-ai/minervamath": {"test.jsonl": [{"question": "i", "answer": "34"}]},
    "Hothan/OlympiadBench": {
        "OE_TO_maths_en_COMP/train-00000-of-00001.parquet": [OLYMPIAD],
        "TP_TO_maths_en_COMP/train-00000-of-00001.parquet": [OLYMPIAD],
    },
    "allenai/ai2_arc": {
        "ARC-Challenge/test-00000-of-00001.parquet": [ARC | {"answerKey": "2"}],
        "ARC-Easy/test-00000-of-00001.parquet": [ARC | {"answerKey": "1"}],
    },
    "Idavidrein/gpqa": {"gpqa_diamond.csv": [GPQA], "gpqa_main.csv": [GPQA]},
    "TIGER-Lab/MMLU-Pro": {
        "data/test-00000-of-00001.parquet": [options("m", **MMLU_PRO)],
        "data/validation-00000-of-00001.parquet": [options("m2", **MMLU_PRO)],
    },
}
EXPECTED = {
    "openr1_math_46k": {"train": ["a", "a2"]},
    "gsm8k": {"train": ["b"], "held_out": ["b2"]},
    "math": {"train": ["c"]},
    "dapo_math_17k": {"train": ["d"]},
    "benchmarks_math": {
        "aime24": ["e"],
        "aime25": ["f"],
        "amc": ["g"],
        "math500": ["h"],
        "minerva": ["i"],
        "olympiad_bench": ["j"],
    },
    "benchmarks_ood": {"arc_c": ["k"], "gpqa_diamond": ["l"], "mmlu_pro": ["m"]},
}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def subsets(files):
    """A README's list of subsets: folders but data/, and files of their own at the top."""
    lines = []
    for name in files:
        subset = name.split("/")[0].removesuffix(".csv")
        if subset in ("data", "test.jsonl"):
            continue
        split = "test" if "/test-" in name else "train"
        if f"- config_name: {subset}" not in lines:
            lines += [f"- config_name: {subset}", "  data_files:"]
        lines += [f"  - split: {split}", f"    path: {name}"]
    return ["configs:", *lines] if lines else []


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A directory that holds every repository under its name."""
    path = tmp_path_factory.mktemp("hub")
    for name, files in REPOSITORIES.items():
        for file, rows in files.items():
            write(path / name / file, rows)
        readme = ["---", *subsets(files), "license: mit", "---", ""]
        (path / name / "README.md").write_text("\n".join(readme))
    return path


@pytest.fixture
def loaded(hub, tmp_path_factory, monkeypatch):
    """Sets of the files, in the directory where a name of the hub is a local folder."""
    monkeypatch.chdir(hub)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(*names):
        files = [f"--config={ROOT}/configs/data/{name}.yaml" for name in names]
        data = parse(files)[1].data
        if data.train is None:
            (hub / "t.jsonl").write_text('{"prompt": "t", "answer": "1"}\n')
            data = parse([*files, "--data.train.files=t.jsonl"])[1].data
        sets = load_sets(data)
        return {"train": sets.train, **sets.evaluation}

    return load


def test_every_file_is_expected():
    assert {path.stem for path in CONFIGS} == EXPECTED.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_starts_with_its_command(path):
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# python run.py --config RUN.yaml --config configs/data/{path.name}"
    assert re.match(r"# \w", second)


@pytest.mark.parametrize("name", EXPECTED)
def test_its_rows_are_read(name, loaded):
    sets = loaded(name)
    for set_name, prompts in EXPECTED[name].items():
        examples = sets[set_name]
        assert [re.split(r"\n", example.prompt)[0] for example in examples] == prompts
        for example in examples:
            choices = example.metadata.get("choices")
            kind, gold = "math", example.answer
            if choices is not None:
                kind, gold = (
                    "multiple_choice",
                    choices["ABCD".index(example.answer)].removesuffix(" m"),
                )
            assert (example.kind, gold) == (kind, "34")
            asked = "boxed" in example.prompt or "####" in example.prompt
            assert asked == (name not in ("openr1_math_46k", "dapo_math_17k"))
    solutions = name in ("openr1_math_46k", "gsm8k", "math")
    assert all(bool(example.demonstrations) == solutions for example in sets["train"])


@pytest.mark.parametrize("name", ["openr1_math_46k", "gsm8k", "math"])
def test_solutions_are_right_by_their_own_verifier(name, loaded):
    """Solutions of GSM8K and MATH have no think tags, which the kind `math` wants by default."""
    (example, *_) = loaded(name)["train"]
    options = parse([f"--config={ROOT}/configs/data/{name}.yaml"])[1].rewards.options
    columns = columns_of(example.kind, example.metadata, options.get(example.kind, {}))
    verdict = KINDS[example.kind](example.demonstrations[0], example.answer, columns).verdict
    assert verdict == "right"


def test_files_join(loaded):
    """All benchmarks beside one training set; OpenR1's system prompt comes with it."""
    sets = loaded("openr1_math_46k", "benchmarks_ood", "benchmarks_math")
    expected = {"train", *EXPECTED["benchmarks_math"], *EXPECTED["benchmarks_ood"]}
    assert sets.keys() == expected
    assert sets["train"][0].history[0].role == "system"


def test_a_repository_with_other_columns_is_told(hub, loaded):
    write(hub / "math-ai" / "minervamath" / "test.jsonl", [{"problem": "i", "answer": "34"}])
    with pytest.raises(UsageError, match="'question' is missing"):
        loaded("benchmarks_math")
