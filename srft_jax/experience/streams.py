"""Which prompts and demonstrations come next, and the place in them that a checkpoint keeps."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain

from srft_jax.config import Objective, UsageError
from srft_jax.data.examples import Example
from srft_jax.data.pipeline import PromptBatch, prompt_batches

Pair = tuple[int, int]  # index of an example, and of one of its demonstrations


def _digest(examples: Sequence[Example]) -> str:
    """Hash of all that the run sees of the examples, but not of where they were read from."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(repr(dataclasses.replace(example, where="")).encode())
    return digest.hexdigest()


def digests(sets: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    """Return a hash of each set's rows, by its name."""
    return {name: _digest(rows) for name, rows in sets.items()}


def check_same_everywhere(sets: Sequence[Mapping[str, str]]) -> None:
    """Check that all processes have read the same rows.

    Args:
        sets: `digests` of each process.

    Raises:
        UsageError: naming a process and the sets in which it differs from process 0.
    """
    first, *others = sets
    for number, other in enumerate(others, start=1):
        if different := [name for name, digest in first.items() if other[name] != digest]:
            raise UsageError(
                f"process {number} reads other rows than process 0 under the same configuration, "
                f"in the sets {', '.join(different)}"
            )


class Streams:
    """Endless iterators over prompts and demonstrations, and the demonstrations that wait.

    They are the same in all processes, so that a checkpoint serves any number of them.

    Args:
        train: Training problems as text.
        objective: Says which iterators there are.
        prompts_per_step: Prompts of a step, P.
        weights: Weight of each training source, as `Example.source` numbers them.
        seed: Seed of the order.
    """

    def __init__(
        self,
        train: Sequence[Example],
        objective: Objective,
        *,
        prompts_per_step: int,
        weights: Sequence[float],
        seed: int,
    ) -> None:
        batches = functools.partial(prompt_batches, train, weights=weights)
        self._train_digest = _digest(train)
        self._iterators: dict[str, grain.DatasetIterator[PromptBatch]] = {}
        if objective.uses_rollouts:
            self._iterators["prompts"] = batches(prompts_per_step, seed)
        if objective.sft_steps or not objective.uses_rollouts:
            self._iterators["demonstrated"] = batches(prompts_per_step, seed, demonstrated=True)
        if objective.demo_source == "own":  # not in the order of the prompts, hence another seed
            self._iterators["demonstrations"] = batches(
                objective.demo_per_step, seed + 1, demonstrated=True
            )
        self._buffer: list[Pair] = []

    def prompts(self, objective: Objective) -> PromptBatch:
        """Return the next prompts; without rollouts only those that have a demonstration."""
        return next(self._iterators["prompts" if objective.uses_rollouts else "demonstrated"])

    def demonstrations(self) -> list[Pair]:
        """Return the next demonstrations of the iterator of their own."""
        return next(self._iterators["demonstrations"]).pairs()

    def buffer(self, pairs: list[Pair]) -> None:
        """Put demonstrations at the end of the buffer."""
        self._buffer += pairs

    @property
    def num_buffered(self) -> int:
        return len(self._buffer)

    def take_buffered(self, count: int) -> list[Pair]:
        """Take the first `count` demonstrations out of the buffer, which holds that many."""
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def state(self) -> dict[str, Any]:
        """Return, as JSON, positions of the iterators, the buffer, and the training set's digest.

        A position means nothing in another training set.
        """
        # "waiting" and "examples" are what checkpoints that exist call the buffer and the digest.
        positions = {name: iterator.get_state() for name, iterator in self._iterators.items()}
        return {
            "iterators": positions,
            "waiting": [list(pair) for pair in self._buffer],
            "examples": self._train_digest,
        }

    def restore(self, state: dict[str, Any], run_dir: str) -> None:
        """Go to where `state` was taken.

        Raises:
            UsageError: it was taken from another training set.
        """
        if state["examples"] != self._train_digest:
            raise UsageError(
                f"the training set is not the one that {run_dir} was started with: the same "
                "configuration now reads other rows"
            )
        for name, iterator in self._iterators.items():
            iterator.set_state(state["iterators"][name])
        self._buffer = [(example, number) for example, number in state["waiting"]]
