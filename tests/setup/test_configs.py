"""Every file in configs/ says what it is for, loads, and passes all checks that precede a run."""

import dataclasses
import re

import pytest
from tiny_runs import ROOT, tiny_config

from srft_jax.config import SourceConfig, parse, to_yaml
from srft_jax.setup.prepare import prepare

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
class TestConfigFile:
    def test_it_starts_with_command_hardware_time_and_result(self, path):
        first, second = path.read_text().splitlines()[:2]
        command = re.escape(f"python run.py --config configs/{path.name}")
        assert re.fullmatch(rf"# {command}( .*)?", first)
        assert re.fullmatch(r"# Hardware: \S.* Time: \S.* Result: \S.*", second)
        assert "TODO" not in path.read_text()

    def test_it_is_named_in_lower_case(self, path):
        assert re.fullmatch(r"[a-z0-9_.]+\.yaml", path.name)

    def test_it_passes_all_checks(self, path, monkeypatch):
        monkeypatch.chdir(ROOT)
        config = parse([f"--config={path}"])[1]
        setup = prepare(config)
        assert setup.config.run_dir == f"runs/{path.stem}"
        assert len(setup.data.train) >= config.data.prompts_per_step


def test_there_are_configs():
    assert any(path.name == "quickstart.yaml" for path in CONFIGS)


def test_a_stored_config_is_read_back_as_it_was(tmp_path):
    """Presets expanded, nested sections, nulls, small floats."""
    given = tiny_config(
        tmp_path, "--training.optimizer.learning_rate=1e-07", "--generate.prompt=é: 1"
    )
    resolved = prepare(given).config
    assert resolved != given
    for config in (given, resolved):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(config))
        assert parse([f"--config={file}"]) == ("train", config)


def test_flags_override_the_file(tmp_path):
    assert tiny_config(tmp_path).training.num_steps == 6
    config = tiny_config(tmp_path, "--training.num_steps=7")
    assert (config.training.num_steps, config.training.checkpoint_every) == (7, 3)


@pytest.mark.parametrize("config", [["--config={}"], ["--config", "{}"]])
def test_flags_win_wherever_they_stand(tmp_path, config):
    (tmp_path / "a.yaml").write_text("seed: 1\ntraining: {num_steps: 7}\n")
    file = [word.format(tmp_path / "a.yaml") for word in config]
    flag = ["--training.num_steps", "5"]
    for words in ([*flag, *file], [*file, *flag]):
        found = parse(words)[1]
        assert (found.training.num_steps, found.seed) == (5, 1)


def test_a_source_that_comes_another_way_replaces_the_earlier_files(tmp_path):
    """A data set goes on top of a run whose problems are procedural; an amendment stays one."""
    (tmp_path / "run.yaml").write_text(
        "data:\n  train: {procedural: {count: 7}}\n"
        "  evaluation: {a: {procedural: {count: 7}, weight: 2}, b: {files: o, kind: math}}\n"
    )
    (tmp_path / "data.yaml").write_text(
        "data:\n  train: {files: b, kind: exact}\n  evaluation: {a: {files: b, kind: exact}}\n"
    )
    (tmp_path / "more.yaml").write_text(
        "data:\n  train: {limit: 5}\n  evaluation: {a: {limit: 5}, b: {limit: 6}}\n"
    )
    names = ("run", "data", "more")
    data = parse([f"--config={tmp_path}/{name}.yaml" for name in names])[1].data
    assert data.train == SourceConfig(files="b", kind="exact", limit=5)
    assert data.evaluation == {
        "a": SourceConfig(files="b", kind="exact", limit=5),
        "b": SourceConfig(files="o", kind="math", limit=6),
    }


def test_several_files_join_their_evaluation_sets(tmp_path):
    """For other keys the last file's value counts, and a flag's value counts over files."""
    (tmp_path / "a.yaml").write_text(
        "seed: 1\ndata:\n  train: {files: a, kind: math}\n  evaluation: {one: {files: a}}\n"
    )
    (tmp_path / "b.yaml").write_text(
        "data:\n  train: {files: b}\n  evaluation: {two: {files: b}}\n"
    )
    files = [f"--config={tmp_path}/{name}.yaml" for name in "ab"]
    config = parse([*files, "--data.evaluation.one.limit=3"])[1]
    assert (config.seed, config.data.train.files, config.data.train.kind) == (1, "b", "math")
    assert {name: (x.files, x.limit) for name, x in config.data.evaluation.items()} == {
        "one": ("a", 3),
        "two": ("b", None),
    }


def test_evaluation_sets_are_named_by_flags(tmp_path):
    """Without a file; on top of one, where a set keeps its other keys; and all at once."""
    own = parse(["--data.evaluation.mine.files", "m", "--data.evaluation.mine.limit=3"])[1].data
    assert own.evaluation == {"mine": SourceConfig(files="m", limit=3)}
    sets = tiny_config(tmp_path).data.evaluation
    changed = dataclasses.replace(sets["ood"].procedural, count=7)
    data = tiny_config(tmp_path, "--data.evaluation.ood.procedural.count=7").data
    assert data.evaluation == sets | {"ood": SourceConfig(procedural=changed)}
    off = tiny_config(tmp_path, "--data.evaluation.ood=null")
    assert off.data.evaluation == sets | {"ood": None}
    assert list(prepare(off).data.evaluation) == ["held_out"]
    files = ("--data.evaluation.ood.procedural=null", "--data.evaluation.ood.files=m")
    other = tiny_config(tmp_path, *files).data.evaluation
    assert other == sets | {"ood": SourceConfig(files="m")}
    whole = "--data.evaluation={mine: {files: m, columns: {prompt: q}}}"
    assert tiny_config(tmp_path, whole).data.evaluation == {
        "mine": SourceConfig(files="m", columns={"prompt": "q"})
    }
