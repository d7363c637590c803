"""Procedural chains of digits, worked from the left, keeping the last digit of every result:

    prompt          7+5*3-4
    demonstration   <think>2 6 2</think>2          7+5 = 12, 2*3 = 6, 6-4 = 2
    terse           <think></think>2
    answer          2

One step is a small table to know; the whole chain at a glance is hard, so that thinking pays. The
problems depend on the configuration only, never on the run's seed. A hash of the prompt decides
whether it is a training or a held-out problem, so neither a larger set nor another seed moves a
problem across. Out-of-distribution problems have more terms.
"""

import hashlib
import itertools
import operator
import random
from collections.abc import Callable, Iterator

from srft_jax.config import ArithmeticConfig, UsageError
from srft_jax.data.examples import Example, ExampleSets

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
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
    ood = _take("ood", config, ood_terms, config.num_ood, is_held_out)
    return ExampleSets(
        train=tuple(
            make_example(prompt, (_demonstrate(prompt, config),))
            if i < config.num_demonstrated
            else make_example(prompt)
            for i, prompt in enumerate(train)
        ),
        evaluation={
            "held_out": tuple(map(make_example, held_out)),
            "ood": tuple(map(make_example, ood)),
        },
    )


def make_example(prompt: str, demonstrations: tuple[str, ...] = ()) -> Example:
    """The problem that `prompt` spells."""
    return Example(prompt, str(results(prompt)[-1]), demonstrations)


def results(prompt: str) -> list[int]:
    """Last digit after each operation. In: 7+5*3-4.  Out: [2, 6, 2]."""
    values = itertools.accumulate(
        zip(prompt[1::2], map(int, prompt[2::2]), strict=True),
        lambda value, step: OPERATORS[step[0]](value, step[1]) % 10,
        initial=int(prompt[0]),
    )
    return list(values)[1:]


def make_demonstration(prompt: str, *, terse: bool = False) -> str:
    """In: 7+5*3-4.  Out: <think>2 6 2</think>2, or <think></think>2 if terse."""
    steps = [str(value) for value in results(prompt)]
    return f"<think>{'' if terse else ' '.join(steps)}</think>{steps[-1]}"


def _demonstrate(prompt: str, config: ArithmeticConfig) -> str:
    terse = _unit_hash("terse " + prompt) < config.terse_fraction
    return make_demonstration(prompt, terse=terse)


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
) -> list[str]:
    """The first `count` problems that are kept, in the set's own random order."""
    rng = random.Random(f"{config.seed}/{name}")
    kept = list(itertools.islice(filter(keep, _problems(rng, terms, config.operators)), count))
    if len(kept) < count:
        raise UsageError(
            f"data.arithmetic.num_{name} asks for {count} problems, but only {len(kept)} distinct "
            f"{name} problems of {terms[0]} to {terms[1]} terms with {config.operators} exist."
        )
    return kept


def _problems(rng: random.Random, terms: tuple[int, int], operators: str) -> Iterator[str]:
    """Every problem once, in random order, each number of terms equally often while it lasts."""
    per_step = 10 * len(operators)
    orders = {n: _shuffled(rng, 10 * per_step ** (n - 1)) for n in range(terms[0], terms[1] + 1)}
    while orders:
        num_terms = rng.choice(list(orders))
        index = next(orders[num_terms], None)
        if index is None:
            del orders[num_terms]
        else:
            yield _spell(index, num_terms, operators)


def _shuffled(rng: random.Random, size: int) -> Iterator[int]:
    """0..size-1 in random order: Fisher-Yates that stores what moved, so `size` may be huge."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)


def _spell(index: int, num_terms: int, operators: str) -> str:
    """The problem of this number: its first digit, then an operator and a digit for each step."""
    index, digit = divmod(index, 10)
    prompt = str(digit)
    for _ in range(num_terms - 1):
        index, step = divmod(index, 10 * len(operators))
        prompt += operators[step // 10] + str(step % 10)
    return prompt


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
    if not config.operators or len(set(config.operators) & OPERATORS.keys()) < len(
        config.operators
    ):
        raise UsageError(
            f"data.arithmetic.operators are some of {''.join(OPERATORS)}, each once, "
            f"got {config.operators!r}."
        )
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
