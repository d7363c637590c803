"""Sequences to a batch: roles, masks, packing, normalisers; all known before the forward pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from srft_jax.batch import Batch, Normalisers, Role, Rows
from srft_jax.config import TrainingConfig
from srft_jax.objectives.methods import Objective


@dataclasses.dataclass(frozen=True)
class TrainingSequence:
    """A prompt and one answer to it, sampled or given.

    Attributes:
        prompt: Token ids; not trained.
        completion: Token ids, EOS included; trained.
        role: Who wrote the completion.
        advantage: Within its group.
        correct: The verifier's reward reached the threshold.
        old_logprobs: Of the completion under the policy that sampled it; None for demonstrations.
    """

    prompt: Sequence[int]
    completion: Sequence[int] | np.ndarray
    role: Role
    advantage: float = 0.0
    correct: bool = False
    old_logprobs: Sequence[float] | np.ndarray | None = None

    @property
    def num_inputs(self) -> int:
        """The last token is a target only."""
        return len(self.prompt) + len(self.completion) - 1


def max_microbatches(num_sequences: int, longest: int, training: TrainingConfig) -> int:
    """Microbatches that hold so many sequences of up to `longest` tokens, however they fall.

    In: 256 sequences of up to 60, rows of 128, 64 rows.  Out: 2, as a row holds at least two.
    """
    per_row = training.row_length // longest
    return -(-num_sequences // (per_row * training.rows_per_microbatch))


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences of each row.

    In: lengths [3, 6, 4, 2], rows of 8.  Out: [[1, 3], [2, 0]].

    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > row_length:
            raise ValueError(
                f"a sequence of {lengths[index]} tokens does not fit a row of {row_length}"
            )
        row = next(
            (number for number, room in enumerate(free) if room >= lengths[index]), len(rows)
        )
        if row == len(rows):
            rows.append([])
            free.append(row_length)
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def _normaliser(aggregation: str, num_tokens: int, num_sequences: int, length_cap: int) -> float:
    """Z: tokens; sequences, for a mean of their means; or the length cap alone, as LUFFY has it."""
    if num_tokens == 0:
        return 0.0
    return {"tokens": num_tokens, "sequences": num_sequences, "length_cap": length_cap}[aggregation]


def normalisers(
    sequences: Sequence[TrainingSequence], objective: Objective, length_cap: int
) -> Normalisers:
    """Denominators of one optimizer step, over all of its sequences."""
    counts = {role: (0, 0) for role in Role}
    for sequence in sequences:
        tokens, number = counts[sequence.role]
        counts[sequence.role] = (tokens + len(sequence.completion), number + 1)
    demo, own = counts[Role.DEMONSTRATION], counts[Role.SELF]
    both = (demo[0] + own[0], demo[1] + own[1])

    def z(aggregation: str, tokens_and_sequences: tuple[int, int]) -> Any:
        return np.float32(_normaliser(aggregation, *tokens_and_sequences, length_cap))

    return Normalisers(
        demonstration=z(objective.demo_aggregation, demo),
        entropy=z(objective.policy_aggregation, both),
        # Demonstrations count in the policy terms only where they have one.
        policy=z(objective.policy_aggregation, both if objective.demo_policy else own),
        self_tokens=z("tokens", own),
        demonstration_tokens=z("tokens", demo),
    )


def _empty_rows(shape: tuple[int, ...]) -> Rows:
    zeros: Callable[[Any], Any] = functools.partial(np.zeros, shape)
    return Rows(
        tokens=zeros(np.int32),
        targets=zeros(np.int32),
        positions=zeros(np.int32),
        segment_ids=zeros(np.int32),
        sequence_ids=zeros(np.int32),
        role=zeros(np.int32),
        loss_mask=zeros(bool),
        advantage=zeros(np.float32),
        correct=zeros(bool),
        old_logprobs=zeros(np.float32),
        inverse_length=zeros(np.float32),
    )


def _place(
    rows: Rows, where: tuple[int, int, slice], sequence: TrainingSequence, segment: int, number: int
) -> None:
    """Writes one sequence to its slice of a row. See `Rows` for a worked example."""
    tokens = np.concatenate([sequence.prompt, sequence.completion]).astype(np.int32)
    trained = np.arange(sequence.num_inputs) >= len(sequence.prompt) - 1
    rows.tokens[where] = tokens[:-1]
    rows.targets[where] = tokens[1:]
    rows.positions[where] = np.arange(sequence.num_inputs)
    rows.segment_ids[where] = segment
    rows.sequence_ids[where] = number
    rows.role[where] = sequence.role
    rows.loss_mask[where] = trained
    rows.advantage[where] = sequence.advantage
    rows.correct[where] = sequence.correct
    rows.inverse_length[where] = 1.0 / len(sequence.completion)
    if sequence.old_logprobs is not None:
        rows.old_logprobs[where][trained] = sequence.old_logprobs


def make_batch(
    sequences: Sequence[TrainingSequence],
    objective: Objective,
    training: TrainingConfig,
    *,
    num_microbatches: int,
    length_cap: int,
) -> Batch:
    """Packs the sequences of one optimizer step into [M, B, T].

    Args:
        sequences: All of them, of all roles.
        objective: Aggregations, and which roles have which terms.
        training: Row length and rows per microbatch.
        num_microbatches: M, the static shape; see `max_microbatches`.
        length_cap: L_max, for the `length_cap` aggregation.

    Raises:
        ValueError: the sequences need more than M microbatches.
    """
    packed = pack([sequence.num_inputs for sequence in sequences], training.row_length)
    used = -(-len(packed) // training.rows_per_microbatch)
    if used > num_microbatches:
        raise ValueError(
            f"{len(packed)} rows need {used} microbatches of {num_microbatches} there are"
        )
    rows = _empty_rows((num_microbatches, training.rows_per_microbatch, training.row_length))
    sequences_in = [0] * num_microbatches
    for number, indices in enumerate(packed):
        microbatch, row = divmod(number, training.rows_per_microbatch)
        start = 0
        for segment, index in enumerate(indices, start=1):
            end = start + sequences[index].num_inputs
            where = (microbatch, row, slice(start, end))
            _place(rows, where, sequences[index], segment, sequences_in[microbatch])
            sequences_in[microbatch] += 1
            start = end
    num_used: Any = np.int32(used)
    return Batch(rows, normalisers(sequences, objective, length_cap), num_used)
