"""Which prompts a step trains on: an endless, shuffled, checkpointable Grain iterator.

Its elements are indices, not text: the examples stay where they are, and the iterator's state is
one number, the step. Everything random is a function of the seed and the position, so an iterator
whose state is restored continues as if it had never stopped.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Int

from srft_jax.config import UsageError
from srft_jax.data.examples import Example

NO_DEMONSTRATION = -1


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """The prompts of one step.

    Args:
        example: Index of each prompt's example.
        demonstration: Index of the demonstration among the example's; -1 where it has none.
    """

    example: Int[np.ndarray, "P"]
    demonstration: Int[np.ndarray, "P"]

    def pairs(self) -> list[tuple[int, int]]:
        """Return (example, demonstration) for each prompt."""
        return list(zip(self.example.tolist(), self.demonstration.tolist(), strict=True))


def prompt_batches(
    examples: Sequence[Example],
    prompts_per_step: int,
    seed: int,
    *,
    demonstrated: bool = False,
    weights: Sequence[float] = (1.0,),
) -> grain.DatasetIterator[PromptBatch]:
    """Return an iterator of one batch a step, without end.

    In every epoch, all examples of a source are shuffled anew. A batch may hold the end of
    one epoch and the start of the next, so that no example is left out; an example can then stand
    in it twice. Sources take turns by their weights, not by chance, and each goes through epochs of
    its own: with weights 3 and 1, of any four prompts in a row the second source has one. With
    several demonstrations, each visit draws one of them.

    Args:
        examples: The training set, from all sources.
        prompts_per_step: P.
        seed: Seed of shuffles and draws, at least 0.
        demonstrated: Use only examples that have a demonstration; a source without any is left out.
        weights: Weight of each source, as `Example.source` numbers them; relative to each other.

    Raises:
        UsageError: there are fewer than `prompts_per_step` such examples, a weight is not above 0,
            or the seed is negative.
    """
    sources = _by_source(examples, weights, demonstrated=demonstrated)
    total = sum(len(indices) for indices in sources.values())
    if not 1 <= prompts_per_step <= total:
        raise UsageError(
            f"a batch is between 1 and the {total} training examples"
            f"{' with a demonstration' if demonstrated else ''}, got {prompts_per_step}."
        )
    if seed < 0:
        raise UsageError(f"seed is at least 0, got {seed}.")

    def draw(index: int, rng: np.random.Generator) -> tuple[int, int]:
        count = len(examples[index].demonstrations)
        return index, int(rng.integers(count)) if count else NO_DEMONSTRATION

    endless = [
        # Each source has a seed of its own, or sources of one size would be shuffled alike.
        grain.MapDataset.source(indices).seed((seed + 2**24 * number) % 2**32).shuffle().repeat()
        for number, indices in sources.items()
    ]
    mixed = grain.MapDataset.mix(endless, [weights[number] for number in sources])
    drawn = mixed.seed(seed).random_map(draw)
    # Endless, so nothing is dropped; without it Grain's count of batches overflows at size 1.
    steps = drawn.batch(prompts_per_step, drop_remainder=True, batch_fn=_make_batch)
    # No threads: a batch costs milliseconds, as much as starting the sixteen that Grain would.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(steps.to_iter_dataset(options))


def _by_source(
    examples: Sequence[Example], weights: Sequence[float], *, demonstrated: bool
) -> dict[int, list[int]]:
    """Return source -> indices of its examples; sources without any are left out."""
    if not all(weight > 0 for weight in weights):
        raise UsageError(f"the weights of a mixture are above 0, got {list(weights)}.")
    sources: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        if example.demonstrations or not demonstrated:
            sources.setdefault(example.source, []).append(index)
    if missing := sources.keys() - set(range(len(weights))):
        raise ValueError(f"examples of sources {sorted(missing)} have none of {weights = }")
    return sources


def _make_batch(pairs: Sequence[tuple[int, int]]) -> PromptBatch:
    return PromptBatch(*np.asarray(pairs, np.int32).T)
