"""Procedural sums of several terms, solved by writing down the running totals:

    prompt          7+5+9+4
    demonstration   <think>12 21 25</think>25
    answer          25

The problems depend on the configuration only, never on the run's seed. A hash of the prompt decides
whether it is a training or a held-out problem, so neither a larger set nor another seed moves a
problem across. Out-of-distribution problems have more terms. A terse demonstration leaves the totals
out.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator

from srft_jax.config import ArithmeticConfig, UsageError
from srft_jax.data.examples import Example, ExampleSets

HELD_OUT_FRACTION = 1 / 8  # of all problems; the rest may be trained on


def make_sets(config: ArithmeticConfig) -> ExampleSets:
    """The three sets; a larger set starts with the smaller one.

    Raises:
        UsageError: A range is empty or overlaps, or fewer distinct problems exist than asked for.
    """
    _validate(config)
    terms = (config.min_terms, config.max_terms)
    ood_terms = (config.ood_min_terms, config.ood_max_terms)
    train = _take("train", config, terms, config.num_train, lambda prompt: not is_held_out(prompt))
    held_out = _take("held_out", config, terms, config.num_held_out, is_held_out)
    ood = _take("ood", config, ood_terms, config.num_ood, lambda prompt: True)
    return ExampleSets(
        train=tuple(
            make_example(operands, (_demonstrate(operands, config),))
            if i < config.num_demonstrated
            else make_example(operands)
            for i, operands in enumerate(train)
        ),
        held_out=tuple(map(make_example, held_out)),
        ood=tuple(map(make_example, ood)),
    )


def make_example(operands: tuple[int, ...], demonstrations: tuple[str, ...] = ()) -> Example:
    """The problem that adds up `operands`."""
    return Example(
        prompt=make_prompt(operands),
        answer=str(sum(operands)),
        demonstrations=demonstrations,
    )


def make_prompt(operands: tuple[int, ...]) -> str:
    return "+".join(map(str, operands))


def make_demonstration(operands: tuple[int, ...], *, terse: bool = False) -> str:
    """In: (7, 5, 9, 4).  Out: <think>12 21 25</think>25, or <think></think>25 if terse."""
    totals = [str(total) for total in itertools.accumulate(operands)]
    return f"<think>{'' if terse else ' '.join(totals[1:])}</think>{totals[-1]}"


def _demonstrate(operands: tuple[int, ...], config: ArithmeticConfig) -> str:
    terse = _unit_hash("terse " + make_prompt(operands)) < config.terse_fraction
    return make_demonstration(operands, terse=terse)


def is_held_out(prompt: str) -> bool:
    """By content, so that it holds for every configuration and on every machine."""
    return _unit_hash(prompt) < HELD_OUT_FRACTION


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that looks drawn at random and depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _take(
    name: str,
    config: ArithmeticConfig,
    terms: tuple[int, int],
    count: int,
    keep: Callable[[str], bool],
) -> list[tuple[int, ...]]:
    """The first `count` problems that are kept, in the set's own random order."""
    rng = random.Random(f"{config.seed}/{name}")
    problems = _problems(rng, terms, config.max_operand)
    kept = list(itertools.islice((x for x in problems if keep(make_prompt(x))), count))
    if len(kept) < count:
        raise UsageError(
            f"data.arithmetic.num_{name} asks for {count} problems, but only {len(kept)} distinct "
            f"{name} problems of {terms[0]} to {terms[1]} terms up to {config.max_operand} exist."
        )
    return kept


def _problems(
    rng: random.Random, terms: tuple[int, int], max_operand: int
) -> Iterator[tuple[int, ...]]:
    """Every problem once, in random order, each number of terms equally often while it lasts."""
    orders = {n: _shuffled(rng, max_operand**n) for n in range(terms[0], terms[1] + 1)}
    while orders:
        num_terms = rng.choice(list(orders))
        index = next(orders[num_terms], None)
        if index is None:
            del orders[num_terms]
        else:
            yield _operands(index, num_terms, max_operand)


def _shuffled(rng: random.Random, size: int) -> Iterator[int]:
    """0..size-1 in random order: Fisher-Yates that stores what moved, so `size` may be huge."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)


def _operands(index: int, num_terms: int, max_operand: int) -> tuple[int, ...]:
    """The digits of `index` in base `max_operand`, each plus one."""
    operands = []
    for _ in range(num_terms):
        index, digit = divmod(index, max_operand)
        operands.append(digit + 1)
    return tuple(operands)


def _validate(config: ArithmeticConfig) -> None:
    low, high = config.min_terms, config.max_terms
    ood_low, ood_high = config.ood_min_terms, config.ood_max_terms
    if not 2 <= low <= high:
        raise UsageError(
            f"data.arithmetic needs 2 <= min_terms <= max_terms, got {low} and {high}."
        )
    if not high < ood_low <= ood_high:
        raise UsageError(
            "data.arithmetic needs max_terms < ood_min_terms <= ood_max_terms, "
            f"got {high}, {ood_low} and {ood_high}."
        )
    if config.max_operand < 1:
        raise UsageError(f"data.arithmetic.max_operand is at least 1, got {config.max_operand}.")
    if not 0 <= config.terse_fraction <= 1:
        raise UsageError(
            f"data.arithmetic.terse_fraction is between 0 and 1, got {config.terse_fraction}."
        )
    counts = {"train": config.num_train, "held_out": config.num_held_out, "ood": config.num_ood}
    for name, count in counts.items():
        if count < 0:
            raise UsageError(f"data.arithmetic.num_{name} is at least 0, got {count}.")
    if not 0 <= config.num_demonstrated <= config.num_train:
        raise UsageError(
            f"data.arithmetic.num_demonstrated is between 0 and num_train = {config.num_train}, "
            f"got {config.num_demonstrated}."
        )
