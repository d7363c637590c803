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
        demonstration: Index among the example's demonstrations; -1 where it has none.
    """

    example: Int[np.ndarray, "P"]
    demonstration: Int[np.ndarray, "P"]

    def pairs(self) -> list[tuple[int, int]]:
        """(example, demonstration) of each prompt."""
        return list(zip(self.example.tolist(), self.demonstration.tolist(), strict=True))


def prompt_batches(
    examples: Sequence[Example], prompts_per_step: int, seed: int, *, demonstrated: bool = False
) -> grain.DatasetIterator[PromptBatch]:
    """One batch a step, without end.

    Every epoch is a shuffle of its own of all examples. A batch may hold the end of one epoch and
    the start of the next, so that no example is left out; an example can then stand in it twice.
    With several demonstrations, each visit draws one of them.

    Args:
        examples: The training set.
        prompts_per_step: P.
        seed: Of shuffles and draws, at least 0.
        demonstrated: Only of examples that have a demonstration.

    Raises:
        UsageError: There are fewer than `prompts_per_step` such examples, or the seed is negative.
    """
    counts = [len(example.demonstrations) for example in examples]
    chosen = [index for index, count in enumerate(counts) if count or not demonstrated]
    if not 1 <= prompts_per_step <= len(chosen):
        raise UsageError(
            f"a batch is between 1 and the {len(chosen)} training examples"
            f"{' with a demonstration' if demonstrated else ''}, got {prompts_per_step}."
        )
    if seed < 0:
        raise UsageError(f"seed is at least 0, got {seed}.")

    def draw(number: int, rng: np.random.Generator) -> tuple[int, int]:
        index = chosen[number]
        count = counts[index]
        return index, int(rng.integers(count)) if count else NO_DEMONSTRATION

    dataset = grain.MapDataset.range(len(chosen)).seed(seed).shuffle().repeat().random_map(draw)
    # Endless, so nothing is dropped; without it Grain's count of batches overflows at size 1.
    steps = dataset.batch(prompts_per_step, drop_remainder=True, batch_fn=_make_batch)
    # No threads: an element costs microseconds, and starting sixteen threads does not.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(steps.to_iter_dataset(options))


def _make_batch(pairs: Sequence[tuple[int, int]]) -> PromptBatch:
    example, demonstration = np.asarray(pairs, np.int32).T
    return PromptBatch(example, demonstration)
