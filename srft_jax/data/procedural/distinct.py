"""Problems of a family in random order, each once."""

import random
from collections.abc import Iterator, Sequence

from srft_jax.data.procedural.problem import Problem, Space


def draw_problems(rng: random.Random, spaces: Sequence[Space]) -> Iterator[Problem]:
    """Yield every problem once, in random order, each space equally often while it lasts."""
    orders = [_in_random_order(rng, space) for space in spaces]
    while orders:
        order = rng.choice(orders)
        problem = next(order, None)
        if problem is None:
            orders.remove(order)
        else:
            yield problem


def _in_random_order(rng: random.Random, space: Space) -> Iterator[Problem]:
    seen = set()
    for index in _shuffled(rng, space.count):
        problem = space.problem(index)
        if problem is not None and problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def _shuffled(rng: random.Random, size: int) -> Iterator[int]:
    """Yield 0..size-1 in random order, by a Fisher-Yates that stores only what moved.

    So `size` may be huge.
    """
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)
