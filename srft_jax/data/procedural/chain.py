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

from srft_jax.config import ProceduralConfig, UsageError
from srft_jax.data.examples import Example

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HELD_OUT_FRACTION = 1 / 8  # of all problems; the rest may be trained on


def load(config: ProceduralConfig, set_name: str) -> tuple[Example, ...]:
    """The problems of one set; a larger set starts with the smaller one.

    Raises:
        UsageError: Fewer distinct problems exist than are asked for.
    """
    training = set_name == "train"
    prompts = _take(set_name, config, lambda prompt: is_held_out(prompt) != training)
    demonstrated = len(prompts) if config.demonstrated is None else config.demonstrated
    return tuple(
        make_example(prompt, (_demonstrate(prompt, config),))
        if training and i < demonstrated
        else make_example(prompt)
        for i, prompt in enumerate(prompts)
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


def _demonstrate(prompt: str, config: ProceduralConfig) -> str:
    terse = _unit_hash("terse " + prompt) < config.terse_fraction
    return make_demonstration(prompt, terse=terse)


def is_held_out(prompt: str) -> bool:
    """By content, so that it holds for every configuration and on every machine."""
    return _unit_hash(prompt) < HELD_OUT_FRACTION


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that looks drawn at random and depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _take(name: str, config: ProceduralConfig, keep: Callable[[str], bool]) -> list[str]:
    """The first `count` problems that are kept, in the set's own random order."""
    terms = (config.min_size, config.max_size)
    rng = random.Random(f"{config.seed}/{name}")
    problems = _problems(rng, terms, "".join(OPERATORS))
    kept = list(itertools.islice(filter(keep, problems), config.count))
    if len(kept) < config.count:
        raise UsageError(
            f"procedural.count asks for {config.count} problems, but only {len(kept)} distinct "
            f"{name} problems of {terms[0]} to {terms[1]} terms exist."
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
