"""Datasets of the hub: the code path of the hub's own, on local folders in its layout."""

import json
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from srft_jax.config import DataConfig, HubConfig, SourceConfig, UsageError
from srft_jax.data.hub import read_hub
from srft_jax.data.sources import load_sets


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No network is asked, and nothing stays."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def repository(tmp_path):
    """Two subsets; `main` has its training rows in two files."""
    path = tmp_path / "gsm8k"
    files = {
        "main/train-00000-of-00002.parquet": ["a", "b"],
        "main/train-00001-of-00002.parquet": ["c"],
        "main/test-00000-of-00001.parquet": ["d"],
        "socratic/train-00000-of-00001.parquet": ["e"],
    }
    for name, prompts in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {"prompt": prompts, "answer": [1] * len(prompts), "tags": [["x"]] * len(prompts)}
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    (path / "README.md").write_text(
        "---\n"
        "configs:\n"
        "- config_name: main\n"
        "  data_files:\n"
        "  - {split: train, path: main/train-*}\n"
        "  - {split: test, path: main/test-*}\n"
        "- config_name: socratic\n"
        "  data_files:\n"
        "  - {split: train, path: socratic/train-*}\n"
        "---\n"
    )
    return path


def load(name, **options):
    source = SourceConfig(hub=HubConfig(name=str(name), **options))
    return load_sets(DataConfig(train=source)).train


def test_subsets_and_splits(repository):
    train = load(repository, subset="main")
    assert [example.prompt for example in train] == ["a", "b", "c"]
    assert [example.where for example in train] == [
        f"{repository}[train], row {n}" for n in (1, 2, 3)
    ]
    assert train[0].metadata["tags"] == ["x"]
    assert [example.prompt for example in load(repository, subset="main", split="test")] == ["d"]
    assert [example.prompt for example in load(repository, subset="socratic")] == ["e"]


def test_bad_rows_are_numbered_through_all_files_of_a_split(repository):
    file = repository / "main" / "train-00001-of-00002.parquet"
    columns = {"prompt": ["c", " "], "answer": [1, 1], "tags": [["x"], ["x"]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    with pytest.raises(UsageError) as error:
        load(repository, subset="main")
    assert str(error.value) == f"{repository}[train], row 4: 'prompt' is empty."
    config = HubConfig(name=str(repository), subset="main")
    for batch in (1, 3, 128):
        places = [row.where for row in read_hub(config, "data.train.hub", batch=batch)]
        assert places == [f"{repository}[train], row {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "Config name is missing"),
        ({"subset": "man"}, "BuilderConfig 'man' not found. Available: ['main', 'socratic']"),
        ({"subset": "main", "split": "dev"}, 'Unknown split "dev"'),
    ],
)
def test_what_the_repository_does_not_have(repository, options, reason):
    with pytest.raises(UsageError) as error:
        load(repository, **options)
    told = str(error.value)
    assert told.startswith(f"data.train.hub: {repository} cannot be loaded: {reason}")
    assert told.endswith("; check its subset and split.") and "\n" not in told


def test_an_error_of_the_library_that_speaks_http_names_the_dataset(monkeypatch):
    """httpx has errors of its own, which are no OSError: with a part of a dataset in the cache."""

    def load_dataset(*_, **__):
        raise type("ConnectError", (Exception,), {})("Temporary failure in name resolution")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UsageError, match="cannot be loaded: Temporary failure in name resolution"):
        load("nobody/nothing")


@pytest.mark.parametrize("name", ["Idavidrein/gpqa", "nobody/nothing", "/no/such/folder"])
def test_a_repository_that_cannot_be_had_offline(name):
    with pytest.raises(UsageError) as error:
        load(name)
    told = str(error.value)
    assert told.startswith(f"data.train.hub: {name} cannot be loaded: Couldn't ")
    assert "set HF_TOKEN; without a network, download it" in told and "\n" not in told


def test_a_file_that_is_no_parquet(repository):
    (repository / "main" / "test-00000-of-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"gsm8k cannot be loaded: .*: .*[Pp]arquet"):
        load(repository, subset="main", split="test")


def test_a_local_folder_has_no_revisions(repository):
    with pytest.raises(UsageError, match="hub.revision = v1, but .* is a local folder"):
        load(repository, subset="main", revision="v1")


def test_without_the_library(repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"needs the library `datasets`: pip install 'srft_jax\[hub\]'"
    ):
        load(repository)


def test_rows_of_json_are_the_same_as_of_files(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "n": 2}, {"prompt": "b", "answer": "1", "n": 3}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_files = load_sets(
        DataConfig(train=SourceConfig(files=str(tmp_path / "train.jsonl")))
    ).train
    from_hub = load(tmp_path)
    assert [vars(x) | {"where": ""} for x in from_hub] == [
        vars(x) | {"where": ""} for x in from_files
    ]
