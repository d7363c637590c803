"""From groups to batches: what of them is trained on, as which role, with which advantage."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from srft_jax.batch import GIVEN, Batch, Role, Trajectory
from srft_jax.config import Objective, TrainingConfig
from srft_jax.experience.collect import Sources
from srft_jax.experience.groups import Group
from srft_jax.objectives.advantages import group_advantages, overlong
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.objectives.schedules import mix_weights, top_entropy
from srft_jax.objectives.stages import Stage, Stages

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """How sequences become batches.

    Attributes:
        training: Row length, rows per microbatch, updates per rollout.
        longest_sequence: Input tokens of the longest prompt and answer.
        length_cap: L_max, the longest completion, for aggregations and the overlong penalty.
    """

    training: TrainingConfig
    longest_sequence: int
    length_cap: int


@dataclasses.dataclass(frozen=True)
class Update:
    """One update."""

    stage: Stage
    batch: Batch


@dataclasses.dataclass(frozen=True)
class PlannedUpdate:
    """An update whose sequences are not packed yet."""

    stage: Stage
    sequences: list[TrainingSequence]


def plan_updates(
    groups: Sequence[Group],
    sources: Sources,
    options: BatchOptions,
    stages: Stages,
    step: int,
) -> list[PlannedUpdate]:
    """Return what each update on one rollout trains on, the groups split evenly between them.

    Updates on full buffers of demonstrations follow. Where nothing has a gradient, there is no
    update: momentum alone would move the parameters. Advances `sources.streams`: its iterator of
    demonstrations, and the buffer.

    Args:
        groups: As sampled.
        sources: Demonstrations with an iterator of their own, and the buffer.
        options: How sequences become batches.
        stages: Objectives of the run.
        step: From 1.
    """
    stage = stages.at(step)
    objective, parts = stage.objective, options.training.updates_per_rollout
    # The gate says whose demonstrations are trained on at all; the buffer takes these out of their
    # groups; the split comes last, so that updates share what is trained on now.
    gated = [gate(group, objective) for group in groups]
    if objective.demo_buffer:
        gated = _move_to_buffer(gated, sources)
    pairs = sources.streams.demonstrations() if objective.demo_source == "own" else []
    demo_weight, self_weight = mix_weights(objective, stage.stage_step(step))
    planned = []
    for some_groups, some_pairs in zip(_split(gated, parts), _split(pairs, parts), strict=True):
        sequences = [
            sequence
            for group in some_groups
            for sequence in group_sequences(group, objective, options)
        ]
        sequences += [demonstration_sequence(sources, pair) for pair in some_pairs]
        weighted = [
            dataclasses.replace(
                sequence, weight=demo_weight if _is_demonstration(sequence) else self_weight
            )
            for sequence in sequences
        ]
        planned.append(PlannedUpdate(stage, weighted))
    if stage is stages.policy and stages.buffered is not None:
        planned += _on_buffer(sources, stages.buffered)
    return [
        update
        for update in planned
        if any(_has_gradient(sequence, update.stage.objective) for sequence in update.sequences)
    ]


def pack_updates(
    planned: Sequence[PlannedUpdate], options: BatchOptions, version: int
) -> list[Update]:
    """Return the updates of one rollout.

    Args:
        planned: All updates of the step.
        options: How sequences become batches.
        version: Number of updates that the parameters at hand have had.
    """
    on_policy = is_on_policy(planned, version)
    return [
        Update(
            update.stage,
            make_batch(
                update.sequences,
                update.stage.objective,
                options.training,
                num_microbatches=update.stage.num_microbatches(
                    options.longest_sequence, options.training
                ),
                length_cap=options.length_cap,
                on_policy=on_policy,
            ),
        )
        for update in planned
    ]


def is_on_policy(updates: Sequence[PlannedUpdate], version: int) -> bool:
    """Return whether each update trains on what the very parameters it starts from have drawn.

    The versions in the trajectories say so: update number u of the step starts from version + u.
    One stale trajectory, and all ratios of the step are taken to the stored log-probs.
    In: one update on trajectories of version 7, at version 7.  Out: True.  In: two.  Out: False.
    """
    return all(
        sequence.trajectory.version in (version + number, GIVEN)
        for number, update in enumerate(updates)
        for sequence in update.sequences
    )


def _on_buffer(sources: Sources, stage: Stage) -> list[PlannedUpdate]:
    """Updates on the buffered demonstrations, as often as the buffer is full."""
    updates = []
    while sources.streams.num_buffered >= stage.sequences_per_update:
        pairs = sources.streams.take_buffered(stage.sequences_per_update)
        sequences = [demonstration_sequence(sources, pair) for pair in pairs]
        updates.append(PlannedUpdate(stage, sequences))
    return updates


def gate(group: Group, objective: Objective) -> Group:
    """Return what of a group goes on, by how many of its completions are correct."""
    if objective.gate == "none" or group.demonstration is None:
        return group
    if sum(trajectory.correct for trajectory in group.trajectories) > objective.gate_solved:
        return dataclasses.replace(group, demonstration=None)
    if objective.gate == "either":
        return dataclasses.replace(group, trajectories=())
    return group


def _move_to_buffer(groups: Sequence[Group], sources: Sources) -> list[Group]:
    """The groups without their demonstrations, which wait."""
    sources.streams.buffer([group.pair for group in groups if group.demonstration is not None])
    return [dataclasses.replace(group, demonstration=None) for group in groups]


def _split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """In: 5 items, 2 parts.  Out: the first 2, the other 3."""
    count = len(items)
    return [items[part * count // parts : (part + 1) * count // parts] for part in range(parts)]


def _has_gradient(sequence: TrainingSequence, objective: Objective) -> bool:
    """Whether some term of the objective wants its tokens likelier or less likely."""
    roles, has_advantage = set(sequence.roles.tolist()), sequence.advantage != 0
    self_is_weighted = objective.self_form == "likelihood" or (
        objective.self_form == "policy_gradient" and has_advantage
    )
    # Terms that the sequence's weight multiplies. An advantage of 0 is no term.
    weighted = {
        Role.SELF: self_is_weighted,
        Role.DEMONSTRATION: objective.demo_nll or (objective.demo_policy and has_advantage),
        Role.HINT: objective.hint_nll,
        Role.PREFIX: objective.prefix_policy and has_advantage,
    }
    # Terms that no weight multiplies: the KL to the reference, of one role, and the entropy.
    kl_role = Role.SELF if objective.kl_role == "self" else Role.DEMONSTRATION
    unweighted = {
        Role.SELF: objective.entropy_bonus,
        Role.DEMONSTRATION: objective.entropy_bonus,
        kl_role: objective.kl or objective.entropy_bonus,
    }
    return any(unweighted.get(role) or (sequence.weight and weighted.get(role)) for role in roles)


def _is_demonstration(sequence: TrainingSequence) -> bool:
    return bool((sequence.roles == Role.DEMONSTRATION).all())


def demonstration_sequence(sources: Sources, pair: tuple[int, int]) -> TrainingSequence:
    """Return a demonstration on its own, without a group to take an advantage over."""
    prompt = sources.train[pair[0]].prompt
    return TrainingSequence(prompt, sources.demonstrations[pair], Role.DEMONSTRATION)


def group_sequences(
    group: Group, objective: Objective, options: BatchOptions
) -> list[TrainingSequence]:
    """Return the group as sequences, advantages filled in."""
    given = [] if group.demonstration is None else [group.demonstration]
    advantages, demonstration_advantages = group_advantages(
        [
            trajectory.reward + overlong(trajectory, objective, options.length_cap)
            for trajectory in group.trajectories
        ],
        [demonstration.reward for demonstration in given],
        augmented=objective.advantage_group == "augmented",
        divide_by_std=objective.advantage_std,
        baseline=_baseline(objective, group.trajectories),
    )
    sampled = [
        TrainingSequence(
            group.problem.prompt,
            trajectory,
            _roles(objective, trajectory),
            advantage=float(advantage),
        )
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True)
    ]
    demonstrated = [
        TrainingSequence(
            group.problem.prompt,
            demonstration,
            Role.DEMONSTRATION,
            advantage=float(advantage),
        )
        for demonstration, advantage in zip(given, demonstration_advantages, strict=True)
    ]
    return [sequence for sequence in sampled if _is_kept(objective, sequence)] + demonstrated


def _baseline(objective: Objective, trajectories: Sequence[Trajectory]) -> np.ndarray | None:
    """Which completions form the baseline: with `prefix = one` only those without a prefix.

    They alone say what the policy achieves by itself.
    """
    if objective.prefix != "one":
        return None
    return np.asarray([trajectory.num_forced == 0 for trajectory in trajectories], bool)


def _roles(objective: Objective, trajectory: Trajectory) -> Role | np.ndarray:
    """SELF for sampled tokens; HINT, PREFIX or, where nothing trains them, NONE for forced ones."""
    if trajectory.sampled.all():
        return Role.SELF
    roles = np.full(len(trajectory.tokens), Role.SELF)
    forced = ~trajectory.sampled
    roles[forced] = Role.HINT if objective.hint_nll else Role.NONE
    if objective.prefix_policy:
        assert trajectory.entropies is not None  # the sampler has drawn it
        chosen = top_entropy(trajectory.entropies[forced], objective.prefix_top_entropy)
        roles[np.flatnonzero(forced)[chosen]] = Role.PREFIX
    return roles


def _is_kept(objective: Objective, sequence: TrainingSequence) -> bool:
    """Whether a completion is trained on."""
    if objective.self_form == "none" and not objective.entropy_bonus:
        return False  # it was sampled for the advantage of the demonstration
    if objective.keep == "correct":
        return sequence.trajectory.correct and sequence.trajectory.finished
    return sequence.trajectory.finished or not objective.mask_truncated
