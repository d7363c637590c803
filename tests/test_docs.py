"""README.md, CONTRIBUTING.md and docs/ name only what is there: links, files, keys, commands.

The notebook keeps names as they were on their day, so that only its links are checked.
"""

import configparser
import dataclasses
import functools
import importlib
import re
import shlex
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml
from tiny_runs import ROOT

from srft_jax.config import RunConfig, parse

NOTES = ROOT / "BUILD_NOTES.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"(?<![\w/.$:{*-])(?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|jsonl|jinja|svg)\b")
# Folders, or files without a suffix, of the repository.
PLACE = re.compile(r"(?:srft_jax|tests|configs|benchmarks|assets|docs)/[\w./-]*")
# What a reader makes: run directories and their files, and a module of a new family.
THEIRS = re.compile(r"runs/|RUN_DIR/|model/|srft_jax/data/procedural/NAME\.py")
# Configurations of the reader, in place of which a shipped one is read.
A_CONFIG = re.compile(r"(?:(?:gs:/)?\S*/config|RUN)\.yaml|FILE|CONFIG|\.\.\.")


def on_every_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


def blocks(page, language):
    """Fenced blocks of a language, in the order of the page."""
    return [text for name, text in FENCED.findall(page.read_text()) if name == language]


def code_spans(page):
    """What stands between backticks in prose and tables, line breaks as blanks."""
    prose = FENCED.sub("", page.read_text())
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


# ---- links ----


def anchors(page):
    """In: "## On TPUs: what libtpu is told".  Out: {"on-tpus-what-libtpu-is-told"}."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", page.read_text()), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in words}


@pytest.mark.parametrize("page", [*PAGES, NOTES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Inline ones, and those of the notebook: [27 Nov, later], defined below its index."""
    text = FENCED.sub("", page.read_text())
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)", text, re.MULTILINE))
    assert set(re.findall(r"\[(\d\d \w+(?:, \w+)?)\]", text)) <= defined.keys()
    dead = []
    for target in [*re.findall(r"\]\(\s*([^)\s]+)\)", text), *defined.values()]:
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


# ---- files ----


@on_every_page
def test_files_exist(page):
    text = re.sub(r"\w+://\S+", "", page.read_text())
    named = {path for path in FILE.findall(text) if not THEIRS.match(path)}
    places = (ROOT, ROOT / "srft_jax", page.parent)
    assert not {path for path in named if not any((place / path).exists() for place in places)}


@on_every_page
def test_folders_and_lone_file_names_exist(page):
    spans = [span for span in code_spans(page) if not THEIRS.match(span)]
    folders = {span for span in spans if PLACE.fullmatch(span)}
    assert not {folder for folder in folders if not (ROOT / folder).exists()}
    lone = {span for span in spans if re.fullmatch(r"\w+\.py", span)}
    known = {path.name for path in ROOT.glob("*.py")} | {
        path.name
        for room in ("srft_jax", "tests", "benchmarks")
        for path in ROOT.rglob(f"{room}/**/*.py")
    }
    assert lone <= known


# Names in prose that no source has: the reader's, other programs' and the methods page's example.
NOT_OURS = {
    *("DIR", "NAME", "LICENSE", "BUCKET", "PROJECT", "CUDA_VISIBLE_DEVICES"),
    *("reward_std", "frac_reward_zero_std"),  # metrics of TRL
    *("propositional_logic", "rubiks_cube", "rush_hour"),  # generators of reasoning-gym
    "grpo_dft",
}
# PRESETS, TrainState or train_step, but not a part of a path.
IDENTIFIER = re.compile(
    r"(?<![\w./-])(?:[A-Z][A-Z0-9_]{2,}|[A-Z][a-z]+[A-Z]\w+|[a-z]+(?:_[a-z]+)+)\b(?![/.-])"
)


@functools.cache
def words_of_sources():
    """All words in Python files of the repository, this one apart."""
    rooms = (ROOT / room for room in ("srft_jax", "tests", "benchmarks"))
    paths = {path for room in rooms for path in room.rglob("*.py")} - {Path(__file__)}
    return {word for path in paths for word in re.findall(r"\w+", path.read_text())}


@on_every_page
def test_identifiers_exist(page):
    named = {word for span in code_spans(page) for word in IDENTIFIER.findall(span)}
    assert not named - words_of_sources() - NOT_OURS


# ---- keys ----


def is_key(path, kind=RunConfig):
    """Whether a user can set `path`, or it is a section.

    In: ["data", "train", "files"].  Out: True.  Names in a mapping are the user's.
    """
    if not path:
        return True
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if dataclasses.is_dataclass(option):
            hints = typing.get_type_hints(option)
            if path[0] in hints and is_key(path[1:], hints[path[0]]):
                return True
        elif typing.get_origin(option) is dict and is_key(path[1:], typing.get_args(option)[1]):
            return True
        elif option is typing.Any:
            return True
    return False


def keys_named(page):
    """Keys as flags anywhere, and as spans such as `data.too_long: drop` or `mesh.*` in prose."""
    yield from re.findall(r"--([a-z_]+(?:\.\w+)+)", page.read_text())
    for span in code_spans(page):
        name = re.match(r"([a-z_]+)((?:\.(?:[\w-]+|<\w+>))+)", span)
        suffix = re.search(r"\.(?:py|yaml|md|jsonl?|html|jinja|safetensors)\b", span)
        if name and name[1] in SECTIONS and not suffix:
            yield name[0]


@on_every_page
def test_keys_exist(page):
    assert not {key for key in keys_named(page) if not is_key(key.split("."))}


def test_a_wrong_key_is_seen():
    assert is_key("data.train.procedural.count".split("."))
    assert is_key("training.optimizer".split("."))
    assert not is_key("training.optimiser.name".split("."))
    assert not is_key("data.train.procedural.count.more".split("."))


@on_every_page
def test_configurations_load(page, tmp_path):
    for block in blocks(page, "yaml"):
        if "apiVersion" in block or not yaml.safe_load(block).keys() <= SECTIONS:
            continue  # a manifest for a cluster
        file = tmp_path / "page.yaml"
        file.write_text(block)
        assert parse([f"--config={file}"])[0] == "train"


# ---- commands ----


def shell_lines(page):
    """Lines of shell, continued ones joined; what follows a `$ `; and spans in prose."""
    text = "\n".join(blocks(page, "bash"))
    shown = re.findall(r"^ +\$ (.*)", page.read_text(), re.MULTILINE)
    return [*re.sub(r"\\\n", " ", text).splitlines(), *shown, *code_spans(page)]


def words_of(command):
    """Shell words without comments; the quote that ends a command within a command goes."""
    try:
        return shlex.split(command, comments=True)
    except ValueError:
        return shlex.split(command.rstrip().rstrip("'\""), comments=True)


def run_commands(page):
    for line in shell_lines(page):
        if command := re.search(r"python run\.py(?= |$)(.*)", line):
            yield words_of(command[1])


# docs/launch.md has tests of its own, tests/host/test_launch_page.py.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "launch.md"], ids=lambda page: page.name
)
def test_runs_parse(page, monkeypatch):
    """The method that docs/methods.md adds as an example is not there."""
    monkeypatch.chdir(ROOT)
    for words in run_commands(page):
        words = ["configs/quickstart.yaml" if A_CONFIG.fullmatch(word) else word for word in words]
        if "--help" not in words:
            parse([word.replace("grpo_dft", "grpo") for word in words])


def declares(source, flag):
    """Whether a script takes a flag: spelled out, or a size with its default, as in dim=512."""
    name = flag.removeprefix("--").removeprefix("no-")
    return f'"--{name}"' in source or re.search(rf"\b{name.replace('-', '_')}=", source)


@on_every_page
def test_benchmarks_have_the_flags(page):
    shared = (ROOT / "benchmarks" / "sizes.py").read_text()
    for line in shell_lines(page):
        if command := re.search(r"python (benchmarks/\w+\.py)(.*)", line):
            source = (ROOT / command[1]).read_text() + shared
            flags = {word.split()[0] for word in words_of(command[2]) if word.startswith("--")}
            assert not {flag for flag in flags if not declares(source, flag)}, command[1]


@on_every_page
def test_extras_are_declared(page):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {
        name
        for names in re.findall(r"\.\[([\w,]+)\]", page.read_text())
        for name in names.split(",")
    }
    assert extras <= setup["options.extras_require"].keys()


# ---- Python ----


@on_every_page
def test_imports_from_the_package_exist(page):
    for block in blocks(page, "python"):
        for module, names in re.findall(
            r"^from (srft_jax[\w.]*) import (.*)$", block, re.MULTILINE
        ):
            missing = set(names.split(", ")) - set(dir(importlib.import_module(module)))
            assert not missing, module


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rollouts.md", "rewards.md"])
def test_programs_run(name):
    """The first one draws completions from the quickstart's base, the second verifies an answer."""
    programs = [block for block in blocks(ROOT / "docs" / name, "python") if "srft_jax" in block]
    assert programs
    for program in programs:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
