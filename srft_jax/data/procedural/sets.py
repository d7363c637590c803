"""From the configuration to the problems of one set."""

import itertools
import random
from collections.abc import Mapping

from srft_jax.config import UsageError
from srft_jax.config.data import ProceduralConfig
from srft_jax.data.examples import Example
from srft_jax.data.held_out import belongs, unit_hash
from srft_jax.data.procedural import (
    chain,
    countdown,
    gcd_lcm,
    number_base,
    products,
    sorting,
    sums,
)
from srft_jax.data.procedural.distinct import draw_problems
from srft_jax.data.procedural.problem import Problem, ProblemFamily

PROBLEM_FAMILIES: Mapping[str, ProblemFamily] = {
    "chain": ProblemFamily("final_answer", chain.spaces),
    "sums": ProblemFamily("final_answer", sums.spaces),
    "products": ProblemFamily(
        "final_answer", products.spaces, smallest=3
    ),  # 7*8 would spell a chain
    "countdown": ProblemFamily("countdown", countdown.spaces),
    "gcd_lcm": ProblemFamily("final_answer", gcd_lcm.spaces),
    "number_base": ProblemFamily("number_base", number_base.spaces),
    "sorting": ProblemFamily("sorting", sorting.spaces),
}
LARGEST = 100  # largest size: an answer of 100 numbers is still short enough to be verified


def load_procedural(config: ProceduralConfig, set_name: str) -> tuple[Example, ...]:
    """Return distinct problems of a family; a larger set starts with the smaller one.

    A hash of a problem's content decides whether it may stand in `train` or in evaluation sets, so
    neither a larger set nor another seed moves a problem across. Each set has an order of its own.
    Only problems of `train` come with demonstrations.

    Raises:
        UsageError: a value is out of its range, or fewer distinct problems exist than asked for.
    """
    _validate(config)
    shown = config.count if config.demonstrated is None else config.demonstrated
    shown = shown if set_name == "train" else 0
    return tuple(
        Example(
            prompt=problem.prompt,
            answer=problem.answer,
            demonstrations=(procedural_demonstration(problem, config.terse_fraction),)
            if i < shown
            else (),
            kind=PROBLEM_FAMILIES[config.family].kind,
        )
        for i, problem in enumerate(_take(config, set_name))
    )


def procedural_demonstration(problem: Problem, terse_fraction: float = 0.0) -> str:
    """Return the worked answer; a hash of the prompt makes some of them terse.

    In: 7+5*3-4.  Out: <think>2 6 2</think>2, or terse <think></think>2.
    """
    terse = unit_hash("terse " + problem.prompt) < terse_fraction
    return f"<think>{'' if terse else problem.working}</think>{problem.answer}"


def _take(config: ProceduralConfig, set_name: str) -> list[Problem]:
    sizes = range(config.min_size, config.max_size + 1)
    spaces = [space for size in sizes for space in PROBLEM_FAMILIES[config.family].spaces(size)]
    problems = draw_problems(random.Random(f"{config.seed}/{set_name}"), spaces)
    kept = (problem for problem in problems if belongs(problem.content, set_name))
    taken = list(itertools.islice(kept, config.count))
    if len(taken) < config.count:
        side = "training" if set_name == "train" else "held-out"
        raise UsageError(
            f"procedural.count asks for {config.count} problems, but only {len(taken)} distinct "
            f"{side} problems of the family {config.family} exist with sizes from "
            f"{config.min_size} to {config.max_size}."
        )
    return taken


def _validate(config: ProceduralConfig) -> None:
    smallest = PROBLEM_FAMILIES[config.family].smallest
    if not smallest <= config.min_size <= config.max_size <= LARGEST:
        raise UsageError(
            f"procedural needs {smallest} <= min_size <= max_size <= {LARGEST} for the family "
            f"{config.family}, got {config.min_size} and {config.max_size}."
        )
    if config.count < 1:
        raise UsageError(f"procedural.count is at least 1, got {config.count}.")
    if config.demonstrated is not None and not 0 <= config.demonstrated <= config.count:
        raise UsageError(
            f"procedural.demonstrated is between 0 and count = {config.count}, "
            f"got {config.demonstrated}."
        )
    if not 0 <= config.terse_fraction <= 1:
        raise UsageError(
            f"procedural.terse_fraction is between 0 and 1, got {config.terse_fraction}."
        )
