"""One step's experience: prompts in, verified groups out, ready to be trained on."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from srft_jax.batch import Trajectory
from srft_jax.config import Objective
from srft_jax.data.encoding import EncodedExample
from srft_jax.data.pipeline import NO_DEMONSTRATION, PromptBatch
from srft_jax.experience.demonstrations import Demonstrations
from srft_jax.experience.groups import Experience, Group
from srft_jax.experience.scoring import Scorer
from srft_jax.experience.streams import Streams
from srft_jax.experience.verified_sampling import NO_PROGRESS, VerifiedRollout, sample_verified
from srft_jax.objectives.schedules import prefix_length
from srft_jax.objectives.stages import Stage
from srft_jax.rollout import Observer, Request, Sampler


@dataclasses.dataclass(frozen=True)
class Sources:
    """What all steps of a run take their experience from.

    Attributes:
        train: Training problems.
        demonstrations: All of theirs, scored where rewards are used.
        streams: Which prompts and demonstrations come next.
    """

    train: Sequence[EncodedExample]
    demonstrations: Demonstrations
    streams: Streams


@dataclasses.dataclass(frozen=True)
class GroupOptions:
    """How groups are asked for.

    Attributes:
        prompts_per_step: Groups of a step, P.
        completions_per_prompt: Group size G; a demonstration comes on top.
        stop_ids: Token ids that end a completion.
        stop_strings: Texts that end a completion.
        seed: Seed of prefix lengths and of completions.
    """

    prompts_per_step: int
    completions_per_prompt: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    seed: int = 0


@functools.partial(jax.profiler.annotate_function, name="rollout")
def collect(
    sampler: Sampler,
    scorer: Scorer,
    sources: Sources,
    options: GroupOptions,
    stage: Stage,
    step: int,
    observer: Observer | None = None,
) -> Experience:
    """Sample and verify a group for each prompt of the step.

    With `objective.drop_zero_std`, further prompts replace the groups left out,
    `objective.max_refills` times at most.

    Args:
        sampler: Holds the current policy's parameters; unused by an objective without rollouts.
        scorer: Verifiers.
        sources: Prompts and demonstrations.
        options: How groups are asked for.
        stage: Objective of the step.
        step: From 1.
        observer: Called with the sampler's progress.
    """
    objective = stage.objective
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(options.seed), 1), step)
    rollouts: list[VerifiedRollout] = []
    sampled: list[Group] = []
    kept: list[Group] = []
    for refill in range(objective.max_refills + 1):
        prompts = sources.streams.prompts(objective)
        refill_key = jax.random.fold_in(key, refill) if refill else key
        requests = _requests(sources, options, stage, step, prompts)
        rollouts.append(_sample(sampler, scorer, sources, requests, prompts, refill_key, observer))
        groups = _groups(sources, objective, prompts, rollouts[-1].groups)
        sampled += groups
        kept += [group for group in groups if not _is_dropped(group, objective)]
        # Enough groups; a last refill may bring more than that, or leave too few.
        if len(kept) >= options.prompts_per_step:
            break
    dropped = len(sampled) - len(kept)
    return Experience(sampled, kept[: options.prompts_per_step], refill, dropped, rollouts)


def _is_dropped(group: Group, objective: Objective) -> bool:
    """Whether the verifier's rewards are all equal and such groups are left out.

    Neither shaping nor the overlong penalty is looked at: hardly two lengths are equal.
    """
    rewards = group.verifier_rewards
    if group.demonstration is not None and objective.advantage_group == "augmented":
        rewards = [*rewards, group.demonstration.verifier_reward]
    return objective.drop_zero_std and len(set(rewards)) == 1


def _groups(
    sources: Sources,
    objective: Objective,
    prompts: PromptBatch,
    members: Sequence[Sequence[Trajectory]],
) -> list[Group]:
    with_groups = objective.trains_demonstrations and objective.demo_source == "group"
    return [
        Group(
            pair=pair,
            problem=sources.train[pair[0]],
            trajectories=trajectories,
            demonstration=sources.demonstrations.get(pair) if with_groups else None,
        )
        for pair, trajectories in zip(prompts.pairs(), members, strict=True)
    ]


def _sample(
    sampler: Sampler,
    scorer: Scorer,
    sources: Sources,
    requests: Sequence[Request],
    prompts: PromptBatch,
    key: jax.Array,
    observer: Observer | None,
) -> VerifiedRollout:
    """Sample one group for each prompt; without requests the groups are empty."""
    if not requests:
        return VerifiedRollout([[] for _ in prompts.example], NO_PROGRESS, 0.0)
    examples = [sources.train[index].example for index in prompts.example]
    return sample_verified(sampler, requests, examples, key, scorer, observer)


def _requests(
    sources: Sources, options: GroupOptions, stage: Stage, step: int, prompts: PromptBatch
) -> list[Request]:
    """Requests of all groups; none for an objective without rollouts."""
    if not stage.objective.uses_rollouts:
        return []
    requests: list[Request] = []
    for group, (index, demonstration) in enumerate(prompts.pairs()):
        prefix = _prefix(sources, options.seed, stage, step, index, demonstration)
        plain = Request(
            sources.train[index].prompt,
            options.completions_per_prompt,
            stop_ids=options.stop_ids,
            stop_strings=options.stop_strings,
            group=group,
        )
        requests += _with_prefix(plain, prefix, stage.objective)
    return requests


def _with_prefix(plain: Request, prefix: Sequence[int], objective: Objective) -> list[Request]:
    """One group: all members alike, or a last one apart that starts with the prefix."""
    if not prefix or objective.prefix == "all":
        return [dataclasses.replace(plain, forced=prefix)]
    num_plain = plain.group_size - 1
    prefixed = dataclasses.replace(plain, group_size=1, first_member=num_plain, forced=prefix)
    return [dataclasses.replace(plain, group_size=num_plain), prefixed]


def _prefix(
    sources: Sources, seed: int, stage: Stage, step: int, index: int, demonstration: int
) -> Sequence[int]:
    """The part of the demonstration that completions start with; its end, EOS, is never in it."""
    if stage.objective.prefix == "none" or demonstration == NO_DEMONSTRATION:
        return ()
    tokens = sources.train[index].demonstrations[demonstration]
    rng = np.random.default_rng((seed, step, index))
    length = prefix_length(stage.objective, stage.stage_step(step), len(tokens), rng)
    return tuple(tokens[:length].tolist())
