"""Problems of reasoning-gym's generators, by name; needs the extra `gym`.

Its scorers are not used: nine of them execute what they find in an answer, and many give a part of
the reward for a part of the answer. Completions are compared with the generator's own answer.
"""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from srft_jax.config import UsageError
from srft_jax.config.data import GymConfig
from srft_jax.data.examples import Example
from srft_jax.data.held_out import belongs
from srft_jax.rewards.extraction import MAX_ANSWER

DRAWS_PER_PROBLEM = 32  # the most draws for each problem asked for; evaluated sets keep 1 of 8
DRAWS_PER_DATASET = 1024
KINDS = {"countdown": "countdown", "puzzle24": "countdown"}  # any right expression is right
# These generators go through sets of strings, as two processes with other seeds of `hash` showed.
UNSTABLE = frozenset(
    "codeio isomorphic_strings knight_swap list_functions polynomial_multiplication ransom_note "
    "word_ladder".split()
)

Entry = Mapping[str, Any]


def load_gym(config: GymConfig, set_name: str) -> tuple[Example, ...]:
    """Return distinct problems of a generator; `train` with demonstrations where it has them.

    A hash of the question decides whether it may stand in the set `train` or in evaluation sets.
    Problems whose answer is empty or too long to be verified are left out.

    Raises:
        UsageError: reasoning-gym is not installed, has no such generator or option, refuses a
            value, gives no answers or other problems in each process, or fewer distinct problems
            than asked for.
    """
    if config.count < 1:
        raise UsageError(f"gym.count is at least 1, got {config.count}.")
    examples: dict[str, Example] = {}
    for draw, entry in enumerate(_entries(config)):
        if entry["answer"] is None:
            raise UsageError(
                f"gym.dataset {config.dataset} gives no answers that completions could be compared "
                "with."
            )
        if belongs(entry["question"], set_name) and 0 < len(entry["answer"].strip()) <= MAX_ANSWER:
            example = _example(config.dataset, draw, entry, shown=set_name == "train")
            examples.setdefault(example.prompt, example)
        if len(examples) == config.count:
            return tuple(examples.values())
    side = "training" if set_name == "train" else "held-out"
    raise UsageError(
        f"gym.count asks for {config.count} problems, but {draw + 1} draws of reasoning-gym's "
        f"{config.dataset} give only {len(examples)} distinct {side} ones with an answer of 1 to "
        f"{MAX_ANSWER} characters."
    )


def gym_demonstrations(entry: Entry) -> tuple[str, ...]:
    """Return gsm_symbolic's worked answer without its last line, `#### 42`, which is the answer."""
    working = entry["metadata"].get("answer_cot")
    if working is None:
        return ()
    return (f"<think>\n{working.partition('####')[0].strip()}\n</think>\n{entry['answer']}",)


def _example(dataset: str, draw: int, entry: Entry, *, shown: bool) -> Example:
    return Example(
        prompt=entry["question"],
        answer=entry["answer"],
        demonstrations=gym_demonstrations(entry) if shown else (),
        kind=KINDS.get(dataset, "final_answer"),
        metadata=json.loads(json.dumps(entry["metadata"], default=str)),
        where=f"{dataset} draw {draw}",
    )


def _entries(config: GymConfig) -> Iterator[Entry]:
    """Yield draws: i of seed s is item i % 1024 of the dataset of seed s * 2^20 + i - i % 1024.

    Most generators seed an item with the sum of seed and index, so other seeds must be far off.
    Datasets have one size because a few generators, such as acre, give other items in other sizes.
    """
    create = _factory(config)
    try:
        for start in range(0, DRAWS_PER_PROBLEM * config.count, DRAWS_PER_DATASET):
            dataset = create(seed=(config.seed << 20) + start, size=DRAWS_PER_DATASET)
            for index in range(DRAWS_PER_DATASET):
                yield dataset[index]
    except Exception as error:  # a refused value shows where it is used, by whatever it leads to
        raise UsageError(
            f"reasoning-gym's {config.dataset} fails with seed {config.seed} and options "
            f"{config.options}: {type(error).__name__}: {error}"
        ) from error


def _factory(config: GymConfig) -> Callable[..., Any]:
    """Return a function from seed and size to a dataset; generator and options are checked."""
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise UsageError(
            "A gym source needs reasoning-gym: pip install 'srft_jax[gym]' with a C compiler."
        ) from error
    if config.dataset not in factory.DATASETS:
        raise _unknown("gym.dataset", config.dataset, factory.DATASETS)
    if config.dataset in UNSTABLE and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UsageError(
            f"reasoning-gym's {config.dataset} gives other problems in each process, so that the "
            "run could not be resumed; start it with the environment variable PYTHONHASHSEED=0."
        )
    _, options = factory.DATASETS[config.dataset]
    known = {field.name for field in dataclasses.fields(options)} - {"seed", "size"}
    for name in config.options:
        if name not in known:
            raise _unknown(f"gym.options of {config.dataset}", name, known)
    return functools.partial(factory.create_dataset, config.dataset, **config.options)


def _unknown(key: str, name: str, known: Iterable[str]) -> UsageError:
    close = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it is {', '.join(sorted(known))}."
    return UsageError(f"{key}: there is no {name!r}; {hint}")
