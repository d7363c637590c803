"""From a command line or a stored file to a `RunConfig`, and back.

`parse` turns `run.py VERB --config FILE --section.key VALUE` into a verb and a `RunConfig`. A
mistake of the user is a `UsageError`: one sentence that names the key.
"""

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import jsonargparse
import yaml

from srft_jax.config.data import WAYS
from srft_jax.config.errors import UsageError
from srft_jax.config.sections import RunConfig

Verb = Literal["train", "evaluate", "generate", "export", "report", "inspect", "replay", "plan"]


def parse(argv: Sequence[str]) -> tuple[Verb, RunConfig]:
    """Return the verb and the configuration that a command line asks for.

    Args:
        argv: Words after the program's name: [verb] [--config FILE] [--section.key VALUE ...].
            Flags win over files, wherever they stand.

    Raises:
        UsageError: an unknown or ill-typed key, or a file that cannot be read.
    """
    verbs = get_args(Verb)
    verb, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if verb not in verbs:
        raise UsageError(f"unknown verb {verb!r}; the verbs are {', '.join(verbs)}")
    if verb == "plan":
        flags = [_long_flag(flag) for flag in flags]
    try:
        values = _parser().instantiate(_parser().parse_args(_files_first(flags)))
    except jsonargparse.ArgumentError as error:
        raise UsageError(_in_one_line(str(error))) from None
    fields = {field.name: values[field.name] for field in dataclasses.fields(RunConfig)}
    return cast(Verb, verb), RunConfig(**fields)


def _files_first(flags: Sequence[str]) -> list[str]:
    """Move files to the front: jsonargparse lets the later of a file and a flag win.

    In: --seed 1 --config a.yaml --config=b.yaml.  Out: --config a.yaml --config=b.yaml --seed 1.
    """
    files: list[str] = []
    others: list[str] = []
    words = iter(flags)
    for word in words:
        if word == "--config":
            files += [word, *itertools.islice(words, 1)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files + others


# Short flags of the verb `plan` -> the whole keys, and what a flag without a value sets.
_SHORT = {
    "--topology": ("--plan.topology", ""),
    "--search": ("--plan.search", "=true"),
    "--json": ("--plan.json", "=true"),
}


def _long_flag(flag: str) -> str:
    """In: "--topology=v5e:8x8".  Out: "--plan.topology=v5e:8x8"."""
    name, equals, value = flag.partition("=")
    key, default = _SHORT.get(name, (name, ""))
    return key + (equals + value or default)


# What jsonargparse says around a mistake inside a section that may be null.
_AROUND = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - "
    r"(?:Problem with given class_path '[^']*': )?"
)


def _in_one_line(message: str) -> str:
    """Shorten a message about a section that may be null to what is wrong with the section.

    In: Parser key "data.train": Does not validate ... class_path ...: Option 'file' is not
    accepted - Expected a <class 'NoneType'> ...
    Out: Parser key "data.train": Option 'file' is not accepted
    """
    line = " ".join(message.split())
    if unknown := re.match(r"unrecognized arguments: --([\w.]+)", line):
        return line + _suggestion(unknown[1])
    if "given class_path" not in line:
        return line
    return _AROUND.sub("", line).partition(" - Expected a <class 'NoneType'>")[0]


def _suggestion(key: str) -> str:
    """In: "training.learning_rate".  Out: "; did you mean --training.optimizer.learning_rate?"."""
    known = list(_parser().get_defaults().keys())
    name = "." + key.rpartition(".")[2]
    close = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.endswith(name)]
    return f"; did you mean --{close[0]}?" if close else ""


class _Files(jsonargparse.ActionConfigFile):
    """Several --config: a later file's keys replace an earlier one's, and evaluation sets join.

    A source that comes another way replaces the whole source, as keys of a procedural source mean
    nothing to a source of files.

    In:  {evaluation: {a: {files: x, kind: math}}}, then {evaluation: {a: {limit: 5}, b: ...}}
    Out: {evaluation: {a: {files: x, kind: math, limit: 5}, b: ...}}
    """

    @staticmethod
    def apply_config(
        parser: jsonargparse.ArgumentParser, cfg: jsonargparse.Namespace, dest: str, value: str
    ) -> None:
        train, sets = cfg.get("data.train"), cfg.get("data.evaluation") or {}
        train_ways, set_ways = _ways(train), {name: _ways(sets[name]) for name in sets}
        jsonargparse.ActionConfigFile.apply_config(parser, cfg, dest, value)
        # jsonargparse has dropped the sets that this file does not name, and has put its keys into
        # those that it names.
        sets = {**sets, **(cfg.get("data.evaluation") or {})}
        alone = parser.parse_path(value, defaults=False, _skip_validation=True)
        if _comes_another_way(train_ways, alone.get("data.train")):
            cfg["data.train"] = alone["data.train"]
        for name, source in (alone.get("data.evaluation") or {}).items():
            if _comes_another_way(set_ways.get(name, []), source):
                sets[name] = source
        cfg["data.evaluation"] = sets


def _ways(source: Any) -> list[str]:
    """Return the keys that say where a source's rows come from: one, where it is right."""
    values = {} if source is None else source.init_args
    return [way for way in WAYS if values.get(way) is not None]


def _comes_another_way(ways_before: list[str], source: Any) -> bool:
    """In: ["procedural"], {files: a}.  Out: True.  In: ["procedural"], {limit: 5}.  Out: False."""
    return bool(ways_before) and _ways(source) not in ([], ways_before)


@functools.cache
def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=True)  # --config gs://...
    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        usage=f"run.py [{'|'.join(get_args(Verb))}] [options]",
        exit_on_error=False,
        allow_abbrev=False,  # `--training.num_step` is a mistake, not num_steps
    )
    parser.add_argument(
        "--config", action=_Files, help="YAML file of this page's keys; several join"
    )
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    return parser


def to_yaml(config: RunConfig) -> str:
    """Return the configuration as a file that `parse` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(text: str) -> Any:
    """Return the plain values of a stored configuration; it need not load as a `RunConfig`.

    Raises:
        UsageError: the text is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from error
