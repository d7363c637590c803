"""What the steps take from the training set, and its place in a checkpoint."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import grain

from srft_jax.config import Objective, UsageError
from srft_jax.data.examples import Example
from srft_jax.data.pipeline import PromptBatch, prompt_batches
from srft_jax.mesh import gathered
from srft_jax.setup.prepare import Setup

Pair = tuple[int, int]  # index of an example, and of one of its demonstrations


def _digest(examples: Sequence[Example]) -> str:
    """Of all that the run sees of them, not of where they were read from."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(repr(dataclasses.replace(example, where="")).encode())
    return digest.hexdigest()


def _check_same_everywhere(digests: dict[str, str]) -> None:
    """Raises UsageError where processes have read different sets."""
    first, *others = gathered(digests)
    for number, other in enumerate(others, start=1):
        if different := [name for name, digest in first.items() if other[name] != digest]:
            raise UsageError(
                f"process {number} reads other rows than process 0 under the same configuration, "
                f"in the sets {', '.join(different)}"
            )


class Streams:
    """Endless iterators over prompts and demonstrations, and the demonstrations that wait.

    They are the same in all processes, so that a checkpoint serves any number of them.

    Raises:
        UsageError: the processes have read different sets, be it for training or evaluation.
    """

    def __init__(self, setup: Setup) -> None:
        objective, train = setup.objective, setup.sets.train
        data, seed = setup.config.data, setup.config.seed
        prompts = data.prompts_per_step
        weights = [source.weight for source in data.mixture] or [1.0]
        batches = functools.partial(prompt_batches, train, weights=weights)
        digests = {name: _digest(rows) for name, rows in setup.sets.evaluation.items()}
        self._examples = digests["train"] = _digest(train)
        _check_same_everywhere(digests)
        self._iterators: dict[str, grain.DatasetIterator[PromptBatch]] = {}
        if objective.uses_rollouts:
            self._iterators["prompts"] = batches(prompts, seed)
        if objective.sft_steps or not objective.uses_rollouts:
            self._iterators["demonstrated"] = batches(prompts, seed, demonstrated=True)
        if objective.demo_source == "own":  # not in the order of the prompts, hence another seed
            self._iterators["demonstrations"] = batches(
                objective.demo_per_step, seed + 1, demonstrated=True
            )
        self._waiting: list[Pair] = []

    def prompts(self, objective: Objective) -> PromptBatch:
        """The next prompts; nothing is learned from a prompt alone, without rollouts."""
        return next(self._iterators["prompts" if objective.uses_rollouts else "demonstrated"])

    def demonstrations(self) -> list[Pair]:
        """The next of those with an iterator of their own."""
        return next(self._iterators["demonstrations"]).pairs()

    def wait(self, pairs: list[Pair]) -> None:
        """Demonstrations join the end of the buffer."""
        self._waiting += pairs

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def take_waiting(self, count: int) -> list[Pair]:
        """The first `count` demonstrations leave the buffer; it holds as many."""
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def state(self) -> dict[str, Any]:
        """As JSON: positions of the iterators, the buffer, and a digest of the training set.

        A position means nothing in another training set.
        """
        positions = {name: iterator.get_state() for name, iterator in self._iterators.items()}
        return {
            "iterators": positions,
            "waiting": [list(pair) for pair in self._waiting],
            "examples": self._examples,
        }

    def restore(self, state: dict[str, Any], run_dir: str) -> None:
        """Goes to where `state` was taken.

        Raises:
            UsageError: it was taken from another training set.
        """
        if state["examples"] != self._examples:
            raise UsageError(
                f"the training set is not the one that {run_dir} was started with: the same "
                "configuration now reads other rows"
            )
        for name, iterator in self._iterators.items():
            iterator.set_state(state["iterators"][name])
        self._waiting = [(example, number) for example, number in state["waiting"]]
