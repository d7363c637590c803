"""From the configuration to the three sets of examples."""

import itertools

from srft_jax.config import DataConfig, JsonlConfig, UsageError
from srft_jax.data import arithmetic, jsonl
from srft_jax.data.examples import Example, ExampleSets
from srft_jax.data.problems import raise_problems

__all__ = ["Example", "ExampleSets", "check_disjoint", "load_sets"]


def load_sets(config: DataConfig) -> ExampleSets:
    """The sets of the one source that is configured.

    Raises:
        UsageError: No source or two, one that cannot give its sets, or sets that share a prompt.
    """
    if config.arithmetic is not None and config.jsonl is None:
        sets = arithmetic.make_sets(config.arithmetic)
        check_disjoint(sets, _row_names())
    elif config.jsonl is not None and config.arithmetic is None:
        sets = jsonl.read_sets(config.jsonl)
        check_disjoint(sets, _row_names(config.jsonl))
    else:
        given = "neither is" if config.arithmetic is None else "both are"
        raise UsageError(f"Set exactly one of data.arithmetic and data.jsonl; {given} set.")
    return sets


def check_disjoint(sets: ExampleSets, row_names: dict[str, str]) -> None:
    """No prompt of one set, surrounding blanks apart, stands in another.

    Args:
        sets: What was loaded.
        row_names: By set, what its rows are called; a row number follows.

    Raises:
        UsageError: Names each shared prompt and where it stands.
    """
    named = {"train": sets.train, **sets.evaluation}
    rows = {name: _first_rows(examples) for name, examples in named.items()}
    raise_problems(
        [
            f"The prompt {prompt!r} stands in both {a} ({row_names[a]} {rows[a][prompt]}) "
            f"and {b} ({row_names[b]} {row}); the sets must not overlap."
            for a, b in itertools.combinations(rows, 2)
            for prompt, row in rows[b].items()
            if prompt in rows[a]
        ]
    )


def _first_rows(examples: tuple[Example, ...]) -> dict[str, int]:
    """Prompt -> the first row it stands in, counted from 1."""
    rows: dict[str, int] = {}
    for row, example in enumerate(examples, start=1):
        rows.setdefault(example.prompt.strip(), row)
    return rows


def _row_names(files: JsonlConfig | None = None) -> dict[str, str]:
    if files is None:
        return {name: "example" for name in ("train", "held_out", "ood")}
    return {
        "train": f"{files.train}, row",
        "held_out": f"{files.held_out}, row",
        "ood": f"{files.ood}, row",
    }
