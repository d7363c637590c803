"""From the configuration to the sets of examples."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from srft_jax.config import DataConfig, SourceConfig, UsageError
from srft_jax.data.arrow import read_parquet
from srft_jax.data.examples import Example, ExampleSets, SourceRows
from srft_jax.data.gym import load_gym
from srft_jax.data.hub import read_hub
from srft_jax.data.jsonl import read_json_rows, read_lines
from srft_jax.data.named_sources import TRAIN, NamedSource, check_source, named_sources
from srft_jax.data.problems import SHOWN, raise_problems
from srft_jax.data.procedural import load_procedural
from srft_jax.data.reading import BadRow, read_example
from srft_jax.data.source_rows import Row, find_files

Loaded = tuple[list[Example], SourceRows]  # examples of one source, and its counts

# Ending of a file -> its reader.
READERS = {".jsonl": read_lines, ".json": read_json_rows, ".parquet": read_parquet}


def load_sets(config: DataConfig, *, shown: int = SHOWN) -> ExampleSets:
    """Load all sets, every row of them checked.

    Args:
        config: Where the rows of each set come from.
        shown: Bad rows that are told one by one.

    Raises:
        UsageError: no training source or two kinds of them, a source that cannot be read, bad rows
            (the first of all sources, and how many more), or a prompt that is trained on in an
            evaluation set.
    """
    sources = named_sources(config)
    for named in sources:
        check_source(named)
    problems: list[str] = []
    loaded = [_load(named, problems) for named in sources]
    raise_problems(problems, shown=shown)
    if config.overlap == "drop":
        loaded = _without_evaluated(sources, loaded)
    check_held_out(_by_set(sources, [examples for examples, _ in loaded]))
    sets = _by_set(
        sources, [_instructed(n.source, e) for n, (e, _) in zip(sources, loaded, strict=True)]
    )
    return ExampleSets(
        train=sets.pop(TRAIN),
        evaluation=sets,
        rows=tuple(rows for _, rows in loaded),
    )


def check_held_out(sets: Mapping[str, Sequence[Example]]) -> None:
    """Check that no prompt of `train` stands in another set.

    Surrounding blanks and system turns do not count. Two evaluation sets may share prompts, as
    nothing is learned from either.

    Raises:
        UsageError: names each shared prompt and its places.
    """
    trained = _places(sets[TRAIN])
    raise_problems(
        [
            f"The prompt {_short(prompt[-1])} stands in both {TRAIN} ({trained[prompt]}) "
            f"and {name} ({place}); what is trained on cannot be evaluated."
            for name, examples in sets.items()
            if name != TRAIN
            for prompt, place in _places(examples).items()
            if prompt in trained
        ]
    )


def _without_evaluated(sources: Sequence[NamedSource], loaded: Sequence[Loaded]) -> list[Loaded]:
    """Return all sources, those of training without the rows that are evaluated."""
    pairs = list(zip(sources, loaded, strict=True))
    evaluated = {
        _conversation(example)
        for named, (examples, _) in pairs
        if named.set_name != TRAIN
        for example in examples
    }
    left: list[Loaded] = []
    for named, (examples, rows) in pairs:
        if named.set_name == TRAIN:
            examples = [row for row in examples if _conversation(row) not in evaluated]
        left.append((examples, rows._replace(used=len(examples))))
    return left


def _conversation(example: Example) -> tuple[str, ...]:
    """Return what two rows have in common that ask the same."""
    turns = [turn.content for turn in example.history if turn.role != "system"]
    return (*turns, example.prompt.strip())


def _places(examples: Sequence[Example]) -> dict[tuple[str, ...], str]:
    """Return conversation up to the prompt -> where it stands first."""
    places: dict[tuple[str, ...], str] = {}
    for number, example in enumerate(examples, start=1):
        places.setdefault(_conversation(example), example.where or f"example {number}")
    return places


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _load(named: NamedSource, problems: list[str]) -> Loaded:
    """Return the examples of a source; bad rows join the problems."""
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
    """Yield what a source holds, in its order."""
    key, _, number, source = named
    if source.files is not None:
        for file in find_files(f"{key}.files", source.files, tuple(READERS)):
            yield from READERS[file.suffix](file)
    elif source.hub is not None:
        yield from read_hub(source.hub, f"{key}.hub")
    else:
        for example in _generated(named):
            yield dataclasses.replace(example, source=number)


def _generated(named: NamedSource) -> tuple[Example, ...]:
    source, set_name = named.source, named.set_name
    try:
        if source.procedural is not None:
            return load_procedural(source.procedural, set_name)
        assert source.gym is not None
        return load_gym(source.gym, set_name)
    except UsageError as error:
        raise UsageError(f"{named.key}: {error}") from None


def _instructed(source: SourceConfig, examples: list[Example]) -> list[Example]:
    """Return the examples with the source's instruction after every prompt."""
    if source.instruction is None:
        return examples
    return [
        dataclasses.replace(example, prompt=f"{example.prompt}\n{source.instruction}")
        for example in examples
    ]


def _by_set(
    sources: Sequence[NamedSource], examples: Sequence[Sequence[Example]]
) -> dict[str, tuple[Example, ...]]:
    """Return set -> its examples, one source after the other."""
    sets: dict[str, tuple[Example, ...]] = {}
    for named, loaded in zip(sources, examples, strict=True):
        sets[named.set_name] = sets.get(named.set_name, ()) + tuple(loaded)
    return sets
