"""Sequences to a batch: roles, masks, packing, normalisers; all known before the forward pass."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from srft_jax.batch import Batch, Normalisers, Role, Rows, Trajectory
from srft_jax.config import Aggregation, Objective, TrainingConfig


@dataclasses.dataclass(frozen=True)
class TrainingSequence:
    """A prompt and one answer to it, with what the objective makes of it.

    Attributes:
        prompt: Token ids; they are not trained.
        trajectory: The answer, sampled or given. Its log-probs are what ratios are taken to.
        role: Role of the answer, or of each of its tokens: a forced start has another role than
            what follows, or `Role.NONE` where it is not trained.
        advantage: Advantage within the prompt's group.
        weight: Factor of the likelihood and the policy gradient.
    """

    prompt: Sequence[int] | np.ndarray
    trajectory: Trajectory
    role: Role | Sequence[Role] | np.ndarray
    advantage: float = 0.0
    weight: float = 1.0

    @property
    def roles(self) -> np.ndarray:
        """Role of each token of the answer, int32."""
        return np.broadcast_to(np.asarray(self.role, np.int32), len(self.trajectory.tokens))

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads: the last one is a target only."""
        return len(self.prompt) + len(self.trajectory.tokens) - 1


def max_microbatches(num_sequences: int, longest: int, training: TrainingConfig) -> int:
    """Return how many microbatches hold any `num_sequences` of up to `longest` tokens each.

    In: 256 sequences of up to 60, rows of 128, 64 rows.  Out: 2, as a row holds at least two.
    """
    per_row = training.row_length // longest
    return -(-num_sequences // (per_row * training.rows))


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Pack sequences into rows, best-fit decreasing; return the indices of each row's sequences.

    The longest go first, each to the row in which it leaves the least room. Where none has room, a
    new row begins.

    In: lengths [3, 6, 4, 2], rows of 8.  Out: [[1, 3], [2, 0]], of 6 + 2 and 4 + 3 tokens.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # room and number of each row, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > row_length:
            raise ValueError(
                f"a sequence of {lengths[index]} tokens does not fit a row of {row_length}"
            )
        # The first row whose room is at least the length; of equal rooms the oldest row.
        place = bisect.bisect_left(by_room, (lengths[index], 0))
        if place == len(by_room):
            by_room.append((row_length, len(rows)))
            rows.append([])
        room, row = by_room.pop(place)
        rows[row].append(index)
        bisect.insort(by_room, (room - lengths[index], row))
    return rows


def _count(sequences: Sequence[TrainingSequence], roles: Sequence[Role]) -> tuple[int, int]:
    """Tokens of these roles, and sequences that have any."""
    tokens = [int(np.isin(sequence.roles, roles).sum()) for sequence in sequences]
    return sum(tokens), sum(count > 0 for count in tokens)


def _positive_tokens(sequences: Sequence[TrainingSequence], objective: Objective) -> int:
    """Number of completions' tokens that `loss.is_positive` calls good."""
    if objective.self_form == "none":
        return 0
    by_answer = objective.self_form == "likelihood"
    good = [s for s in sequences if (s.trajectory.correct if by_answer else s.advantage > 0)]
    return _count(good, [Role.SELF])[0]


def normalisers(
    sequences: Sequence[TrainingSequence], objective: Objective, length_cap: int
) -> Normalisers:
    """Return the denominators of one update, over all of its sequences.

    A role's tokens count in a denominator only where the objective has a term for them. An
    aggregation says what is counted:

        tokens         the trained tokens
        sequences      the sequences that have any, for a mean of their means
        sequence_caps  the length cap times those sequences, as in Dr. GRPO
        length_cap     the length cap alone, as in LUFFY's code

    Args:
        sequences: All sequences of the step.
        objective: Aggregations, and which roles have which terms.
        length_cap: L_max, tokens of the longest completion allowed.
    """
    completion, demo, hint = Role.SELF, Role.DEMONSTRATION, Role.HINT
    # (role, coefficient of its term), by the denominator that they share.
    likelihood = [(demo, objective.demo_nll), (hint, objective.hint_nll)]
    policy = [
        (completion, objective.self_form != "none"),
        (demo, objective.demo_policy),
        (Role.PREFIX, objective.prefix_policy),
    ]
    kl = [(completion if objective.kl_role == "self" else demo, objective.kl)]

    def z(aggregation: Aggregation, terms: Sequence[tuple[Role, float]]) -> Any:
        """The denominator of these terms; 0 where they have no tokens."""
        tokens, number = _count(sequences, [role for role, coefficient in terms if coefficient])
        values = {
            "tokens": tokens,
            "sequences": number,
            "sequence_caps": number * length_cap,
            "length_cap": length_cap,
        }
        return np.float32(values[aggregation] if tokens else 0)

    positive: Any = np.float32(_positive_tokens(sequences, objective))
    return Normalisers(
        demonstration=z(objective.demo_aggregation, likelihood),
        policy=z(objective.policy_aggregation, policy),
        kl=z(objective.policy_aggregation, kl),
        entropy=z(objective.policy_aggregation, [(completion, True), (demo, True)]),
        self_tokens=z("tokens", [(completion, True)]),
        positive_tokens=positive,
        demonstration_tokens=z("tokens", [(demo, True)]),
    )


def empty_rows(shape: tuple[int, ...]) -> Rows:
    """Return rows of padding of this shape."""
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
        weight=zeros(np.float32),
        old_logprobs=zeros(np.float32),
        sampler_logprobs=zeros(np.float32),
        inverse_length=zeros(np.float32),
    )


def _inverse_lengths(roles: np.ndarray) -> np.ndarray:
    """1 / number of the sequence's tokens in the same mean as this one, 0 for tokens in no mean.

    Hints are averaged among themselves, as their likelihood has a normaliser of its own.
    In: roles NONE, HINT, HINT, SELF.  Out: 0, 1/2, 1/2, 1.
    """
    hint = roles == Role.HINT
    other = (roles != Role.NONE) & ~hint
    return hint / max(hint.sum(), 1) + other / max(other.sum(), 1)


def _write_sequence(
    rows: Rows, where: tuple[int, int, slice], sequence: TrainingSequence, segment: int, number: int
) -> None:
    """Write one sequence to its slice of a row. See `Rows` for a worked example.

    Args:
        rows: Arrays [M, B, T], written in place.
        where: Microbatch, row, and slice of the row.
        sequence: What is written.
        segment: Number of the sequence in its row, from 1.
        number: Number of the sequence in its microbatch, from 0.
    """
    tokens = np.concatenate([sequence.prompt, sequence.trajectory.tokens]).astype(np.int32)
    roles = sequence.roles
    # Positions whose target is a token of the answer: the last one of the prompt is the first.
    answered = np.arange(sequence.num_inputs) >= len(sequence.prompt) - 1
    rows.tokens[where] = tokens[:-1]
    rows.targets[where] = tokens[1:]
    rows.positions[where] = np.arange(sequence.num_inputs)
    rows.segment_ids[where] = segment
    rows.sequence_ids[where] = number
    rows.advantage[where] = sequence.advantage
    rows.correct[where] = sequence.trajectory.correct
    rows.weight[where] = sequence.weight
    rows.role[where][answered] = roles
    rows.loss_mask[where][answered] = roles != Role.NONE
    rows.inverse_length[where][answered] = _inverse_lengths(roles)
    logprobs = sequence.trajectory.logprobs
    if logprobs is not None:
        rows.old_logprobs[where][answered] = logprobs
        # The sampler has scored what it drew and what it was forced to begin with.
        scored = np.isin(roles, [Role.SELF, Role.HINT, Role.PREFIX])
        rows.sampler_logprobs[where][answered] = np.where(scored, logprobs, 0.0)


def make_batch(
    sequences: Sequence[TrainingSequence],
    objective: Objective,
    training: TrainingConfig,
    *,
    num_microbatches: int,
    length_cap: int,
    on_policy: bool = False,
    pack_rows: Callable[[Sequence[int], int], list[list[int]]] = pack,
) -> Batch:
    """Pack the sequences of one update into [M, B, T].

    Args:
        sequences: All sequences of the step, of all roles.
        objective: Aggregations, and which roles have which terms.
        training: Row length and rows per microbatch.
        num_microbatches: M, the static shape; see `max_microbatches`.
        length_cap: L_max, for the aggregations by it.
        on_policy: See `Batch`. False is right for any sequences, as their ratios are then taken to
            their old log-probs.
        pack_rows: (lengths of all sequences, row length) -> indices of the sequences of each row.

    Raises:
        ValueError: the sequences need more than M microbatches.
    """
    packed = pack_rows([sequence.num_inputs for sequence in sequences], training.row_length)
    used = -(-len(packed) // training.rows)  # rounded up: the last one may be partly empty
    if used > num_microbatches:
        raise ValueError(
            f"{len(packed)} rows need {used} microbatches of {num_microbatches} there are"
        )
    rows = empty_rows((num_microbatches, training.rows, training.row_length))
    sequences_in = [0] * num_microbatches
    for number, indices in enumerate(packed):
        microbatch, row = divmod(number, training.rows)
        start = 0
        for segment, index in enumerate(indices, start=1):
            end = start + sequences[index].num_inputs
            where = (microbatch, row, slice(start, end))
            _write_sequence(
                rows, where, sequences[index], segment=segment, number=sequences_in[microbatch]
            )
            sequences_in[microbatch] += 1
            start = end
    num_used: Any = np.int32(used)
    counts = normalisers(sequences, objective, length_cap)
    return Batch(rows, counts, num_microbatches=num_used, on_policy=on_policy)
