"""From the configuration to the sets of examples."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from srft_jax.config import DataConfig, ProceduralConfig, SourceConfig, UsageError
from srft_jax.data import gym, procedural
from srft_jax.data.arrow import read_parquet
from srft_jax.data.examples import Example, ExampleSets, SourceRows
from srft_jax.data.hub import read_hub
from srft_jax.data.jsonl import read_json, read_lines
from srft_jax.data.problems import raise_problems
from srft_jax.data.reading import BadRow, read_example
from srft_jax.data.rows import Row, find_files
from srft_jax.data.schemas import check_columns

READERS = {".jsonl": read_lines, ".json": read_json, ".parquet": read_parquet}
WAYS = ("files", "hub", "procedural", "gym")
TRAIN = "train"


class NamedSource(NamedTuple):
    """A source and its place in the configuration.

    Attributes:
        key: As in data.mixture[1].
        set_name: That its examples belong to: train, held_out, ood, or the benchmark's name.
        number: In the mixture.
        source: How it is read.
    """

    key: str
    set_name: str
    number: int
    source: SourceConfig


def load_sets(config: DataConfig) -> ExampleSets:
    """All sets, every row of them checked.

    Raises:
        UsageError: No training source or two kinds of them, a source that cannot be read, bad rows
            (the first ten of all sources, and how many more), or sets that share a prompt.
    """
    sources = named_sources(config)
    for named in sources:
        check_source(named)
    problems: list[str] = []
    loaded = [_load(named, problems) for named in sources]
    raise_problems(problems)
    check_disjoint(_by_set(sources, [examples for examples, _ in loaded]))
    sets = _by_set(
        sources, [_instructed(n.source, e) for n, (e, _) in zip(sources, loaded, strict=True)]
    )
    return ExampleSets(
        train=sets.pop(TRAIN),
        evaluation=sets,
        rows=tuple(rows for _, rows in loaded),
    )


def named_sources(config: DataConfig) -> list[NamedSource]:
    """Every source that is configured: training, held_out, ood, benchmarks.

    Raises:
        UsageError: Both or neither of `train` and `mixture`, or a benchmark with a name that is
            taken.
    """
    if (config.train is None) == (not config.mixture):
        given = "neither is" if config.train is None else "both are"
        raise UsageError(f"exactly one of data.train and data.mixture must be set; {given}.")
    training = [config.train] if config.train is not None else config.mixture
    keys = (
        ["data.train"]
        if config.train is not None
        else [f"data.mixture[{number}]" for number in range(len(training))]
    )
    sources = [
        NamedSource(key, TRAIN, number, source)
        for number, (key, source) in enumerate(zip(keys, training, strict=True))
    ]
    evaluation = {"data.held_out": config.held_out, "data.ood": config.ood}
    for name, source in config.benchmarks.items():
        if name in (TRAIN, "held_out", "ood") or "/" in name:
            raise UsageError(f"data.benchmarks: {name!r} cannot name a benchmark; choose another.")
        evaluation[f"data.benchmarks.{name}"] = source
    return sources + [
        NamedSource(key, key.split(".")[-1], 0, source)
        for key, source in evaluation.items()
        if source is not None
    ]


def check_source(named: NamedSource) -> None:
    """What can be said of a source before it is read.

    Raises:
        UsageError: Names the key.
    """
    key, source = named.key, named.source
    ways = [way for way in WAYS if vars(source)[way] is not None]
    if len(ways) != 1:
        given = " and ".join(ways) or "none"
        raise UsageError(
            f"{key} must have exactly one of {', '.join(WAYS)}, but has {given}; "
            f"null turns one off, as in --{key}.procedural null."
        )
    if source.limit is not None and source.limit < 1:
        raise UsageError(f"{key}.limit = {source.limit} is not at least 1.")
    if not 0 < source.weight < math.inf:
        raise UsageError(f"{key}.weight = {source.weight} is not above 0.")
    if source.weight != 1 and not key.startswith("data.mixture"):
        raise UsageError(f"{key}.weight = {source.weight} weighs nothing outside data.mixture.")
    if ways[0] in ("procedural", "gym"):
        _check_generated(named, ways[0])
    else:
        check_columns(key, source)


def _check_generated(named: NamedSource, way: str) -> None:
    """No keys that only rows of files and of the hub are read by."""
    key, source = named.key, named.source
    default = SourceConfig()
    for name in ("columns", "answer_from", "shuffle_options", "kind"):
        if vars(source)[name] != vars(default)[name]:
            raise UsageError(f"{key}.{name} is of files and the hub, but {key} has {way}.")
    if source.procedural is None or named.set_name == TRAIN:
        return
    for name in ("demonstrated", "terse_fraction"):
        value = vars(source.procedural)[name]
        if value != vars(ProceduralConfig())[name]:
            raise UsageError(
                f"{key}.procedural.{name} = {value}, but only training problems are demonstrated."
            )


def check_disjoint(sets: Mapping[str, Sequence[Example]]) -> None:
    """No prompt of one set, surrounding blanks and system turns apart, stands in another.

    Raises:
        UsageError: Names each shared prompt and where it stands.
    """
    places = {name: _places(examples) for name, examples in sets.items()}
    raise_problems(
        [
            f"The prompt {_short(prompt[-1])} stands in both {a} ({places[a][prompt]}) "
            f"and {b} ({place}); the sets must not overlap."
            for a, b in itertools.combinations(places, 2)
            for prompt, place in places[b].items()
            if prompt in places[a]
        ]
    )


def _places(examples: Sequence[Example]) -> dict[tuple[str, ...], str]:
    """Conversation up to the prompt -> where it stands first."""
    places: dict[tuple[str, ...], str] = {}
    for number, example in enumerate(examples, start=1):
        turns = [turn.content for turn in example.history if turn.role != "system"]
        place = example.where or f"example {number}"
        places.setdefault((*turns, example.prompt.strip()), place)
    return places


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _load(named: NamedSource, problems: list[str]) -> tuple[list[Example], SourceRows]:
    """The examples of a source; bad rows join the problems."""
    source, seen, read = named.source, set(), 0
    examples: list[Example] = []
    for row in _rows(named):
        read += 1
        try:
            example = row if isinstance(row, Example) else read_example(row, source, named.number)
        except BadRow as error:
            problems += [f"{row.where}: {problem}" for problem in error.problems]
            continue
        if source.distinct:
            conversation = (example.history, example.prompt)
            if conversation in seen:
                continue
            seen.add(conversation)
        examples.append(example)
        if len(examples) == source.limit:
            break
    if not read and source.procedural is None and source.gym is None:
        raise UsageError(f"{named.key} is empty: {source.files or source.hub} has no rows.")
    return examples, SourceRows(named.key, read, len(examples))


def _rows(named: NamedSource) -> Iterator[Row | Example]:
    """What a source holds, in its order."""
    key, set_name, number, source = named
    if source.files is not None:
        for file in find_files(f"{key}.files", source.files, tuple(READERS)):
            yield from READERS[file.suffix](file)
    elif source.hub is not None:
        yield from read_hub(source.hub, f"{key}.hub")
    else:
        if source.procedural is not None:
            examples = procedural.load(source.procedural, set_name)
        elif source.gym is not None:
            examples = gym.load(source.gym, set_name)
        yield from (dataclasses.replace(example, source=number) for example in examples)


def _instructed(source: SourceConfig, examples: list[Example]) -> list[Example]:
    """With the source's instruction after every prompt."""
    if source.instruction is None:
        return examples
    return [
        dataclasses.replace(example, prompt=f"{example.prompt}\n{source.instruction}")
        for example in examples
    ]


def _by_set(
    sources: Sequence[NamedSource], examples: Sequence[Sequence[Example]]
) -> dict[str, tuple[Example, ...]]:
    """One source after the other."""
    sets: dict[str, tuple[Example, ...]] = {}
    for named, some in zip(sources, examples, strict=True):
        sets[named.set_name] = sets.get(named.set_name, ()) + tuple(some)
    return sets
