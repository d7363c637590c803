"""From groups to batches: what of them is trained on, as which role, with which advantage."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from srft_jax.batch import Batch, Role
from srft_jax.config import Objective
from srft_jax.experience.rollouts import Group, overlong
from srft_jax.experience.streams import Pair, Streams
from srft_jax.objectives.advantages import group_advantages
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.objectives.schedules import mix_weights, top_entropy
from srft_jax.objectives.stages import Stage
from srft_jax.rollout.requests import Completion
from srft_jax.setup.prepare import Setup

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer step."""

    stage: Stage
    batch: Batch


def make_updates(
    setup: Setup, stage: Stage, step: int, groups: Sequence[Group], streams: Streams
) -> list[Update]:
    """The optimizer steps on one rollout, the groups split evenly between them.

    Full buffers of demonstrations follow. Where nothing has a gradient, there is no update.

    Args:
        setup: Of the run.
        stage: Of the step.
        step: From 1.
        groups: As sampled.
        streams: Demonstrations of their own, and those that wait.
    """
    objective, parts = stage.objective, setup.config.training.updates_per_rollout
    gated = [gate(group, objective, setup.config.rewards.correct_threshold) for group in groups]
    if objective.demo_buffer:
        gated = _move_to_buffer(gated, streams)
    given = streams.demonstrations() if objective.demo_source == "own" else []
    demo_weight, self_weight = mix_weights(objective, stage.number(step))
    updates = []
    for of_groups, of_given in zip(_split(gated, parts), _split(given, parts), strict=True):
        sequences = [
            sequence for group in of_groups for sequence in group_sequences(setup, stage, group)
        ] + [demonstration_sequence(setup, pair) for pair in of_given]
        weighted = [
            dataclasses.replace(one, weight=demo_weight if _is_demonstration(one) else self_weight)
            for one in sequences
        ]
        updates += _update(setup, stage, weighted)
    buffered = setup.stages.buffered if objective.demo_buffer else None
    while buffered is not None and streams.num_waiting >= objective.demo_buffer:
        pairs = streams.take_waiting(objective.demo_buffer)
        updates += _update(setup, buffered, [demonstration_sequence(setup, pair) for pair in pairs])
    return updates


def gate(group: Group, objective: Objective, threshold: float) -> Group:
    """What of a group goes on, by how many of its completions are correct."""
    if objective.gate == "none" or group.demonstration is None:
        return group
    if sum(accuracy >= threshold for accuracy in group.accuracies) > objective.gate_solved:
        return dataclasses.replace(group, demonstration=None)
    if objective.gate == "either":
        return dataclasses.replace(group, completions=(), scored=())
    return group


def _move_to_buffer(groups: Sequence[Group], streams: Streams) -> list[Group]:
    """The groups without their demonstrations, which wait."""
    streams.wait(
        [
            (group.example, group.demonstration)
            for group in groups
            if group.demonstration is not None
        ]
    )
    return [dataclasses.replace(group, demonstration=None) for group in groups]


def _split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """In: 5 items, 2 parts.  Out: the first 2, the other 3."""
    count = len(items)
    return [items[part * count // parts : (part + 1) * count // parts] for part in range(parts)]


def _update(setup: Setup, stage: Stage, sequences: Sequence[TrainingSequence]) -> list[Update]:
    """None where no sequence has a gradient: momentum alone would move the parameters."""
    if not any(_has_gradient(sequence, stage.objective) for sequence in sequences):
        return []
    batch = make_batch(
        sequences,
        stage.objective,
        setup.config.training,
        num_microbatches=setup.num_microbatches(stage),
        length_cap=setup.config.rollout.max_new_tokens,
        on_policy=setup.config.training.updates_per_rollout == 1,
    )
    return [Update(stage, batch)]


def _has_gradient(sequence: TrainingSequence, objective: Objective) -> bool:
    """Some term of the objective wants its tokens likelier or less likely."""
    roles, has_advantage = set(sequence.roles.tolist()), sequence.advantage != 0
    of_self = objective.self_form == "likelihood" or (
        objective.self_form == "policy_gradient" and has_advantage
    )
    weighted = {
        Role.SELF: of_self,
        Role.DEMONSTRATION: objective.demo_nll or (objective.demo_policy and has_advantage),
        Role.HINT: objective.hint_nll,
        Role.PREFIX: objective.prefix_policy and has_advantage,
    }
    kl_role = Role.SELF if objective.kl_role == "self" else Role.DEMONSTRATION
    unweighted = {
        Role.SELF: objective.entropy_bonus,
        Role.DEMONSTRATION: objective.entropy_bonus,
        kl_role: objective.kl or objective.entropy_bonus,
    }
    return any(unweighted.get(role) or (sequence.weight and weighted.get(role)) for role in roles)


def _is_demonstration(sequence: TrainingSequence) -> bool:
    return bool((sequence.roles == Role.DEMONSTRATION).all())


def demonstration_sequence(setup: Setup, pair: Pair) -> TrainingSequence:
    """A demonstration on its own, without a group to take an advantage over."""
    example, number = setup.encoded.train[pair[0]], pair[1]
    return TrainingSequence(
        example.prompt,
        example.demonstrations[number],
        Role.DEMONSTRATION,
        old_logprobs=example.behavior_logprobs[number],
    )


def group_sequences(setup: Setup, stage: Stage, group: Group) -> list[TrainingSequence]:
    """The group as sequences, advantages and correctness filled in."""
    objective, threshold = stage.objective, setup.config.rewards.correct_threshold
    given = group.demonstration is not None
    penalties = [overlong(setup, objective, one) for one in group.completions]
    advantages, demonstration_advantages = group_advantages(
        [reward + penalty for reward, penalty in zip(group.rewards, penalties, strict=True)],
        [group.demonstration_reward] if given else [],
        augmented=objective.advantage_group == "augmented",
        divide_by_std=objective.advantage_std,
        baseline=_baseline(objective, group.completions),
    )
    prompt = setup.encoded.train[group.example].prompt
    sequences = [
        TrainingSequence(
            prompt,
            completion.tokens,
            _roles(objective, completion),
            float(advantage),
            accuracy >= threshold,
            completion.logprobs,
        )
        for completion, advantage, accuracy in zip(
            group.completions, advantages, group.accuracies, strict=True
        )
        if _is_kept(objective, completion, accuracy >= threshold)
    ]
    if group.demonstration is not None:
        sequences.append(
            dataclasses.replace(
                demonstration_sequence(setup, (group.example, group.demonstration)),
                advantage=float(demonstration_advantages[0]),
                correct=group.demonstration_accuracy >= threshold,
            )
        )
    return sequences


def _baseline(objective: Objective, completions: Sequence[Completion]) -> np.ndarray | None:
    """Beside a single prefixed completion, only the others say what the policy achieves alone."""
    if objective.prefix != "one":
        return None
    return np.asarray([completion.num_forced == 0 for completion in completions], bool)


def _roles(objective: Objective, completion: Completion) -> Role | np.ndarray:
    """SELF, after forced tokens HINT, PREFIX or, where they are not trained, NONE."""
    if not completion.num_forced:
        return Role.SELF
    roles = np.full(len(completion.tokens), Role.SELF)
    forced = roles[: completion.num_forced]
    forced[:] = Role.HINT if objective.hint_nll else Role.NONE
    if objective.prefix_policy:
        entropies = completion.entropies[: completion.num_forced]
        forced[top_entropy(entropies, objective.prefix_top_entropy)] = Role.PREFIX
    return roles


def _is_kept(objective: Objective, completion: Completion, correct: bool) -> bool:
    if objective.self_form == "none" and not objective.entropy_bonus:
        return False  # it was sampled for the advantage of the demonstration
    if objective.keep == "correct":
        return correct and completion.finished
    return completion.finished or not objective.mask_truncated
