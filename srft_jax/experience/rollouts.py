"""One step's experience: prompts in, verified groups out, ready to be trained on."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from srft_jax.config import Objective
from srft_jax.data.examples import place
from srft_jax.data.pipeline import NO_DEMONSTRATION, PromptBatch
from srft_jax.experience.streams import Streams
from srft_jax.experience.verdicts import Scored, completion_text, verify
from srft_jax.experience.verified import NO_PROGRESS, Rollout, Verified, sample_verified
from srft_jax.mesh import gathered
from srft_jax.models.decoder import Params
from srft_jax.objectives.advantages import overlong_penalty
from srft_jax.objectives.schedules import prefix_length
from srft_jax.objectives.stages import Stage
from srft_jax.rewards import RewardPool
from srft_jax.rollout import Completion, Observer, Request
from srft_jax.setup.prepare import Setup


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt, its completions and the demonstration that is trained on beside them.

    Attributes:
        example: Index of the training example.
        completions: Sampled by the policy; none for an objective without rollouts.
        scored: The verdict on each.
        demonstration: Its number among the example's, or None.
        demonstration_scored: What the same verifiers say of it; None where no reward is used.
    """

    example: int
    completions: Sequence[Completion]
    scored: Sequence[Scored]
    demonstration: int | None
    demonstration_scored: Scored | None

    @property
    def rewards(self) -> list[float]:
        """What advantages are taken over, shaping included."""
        return [one.reward for one in self.scored]

    @property
    def accuracies(self) -> list[float]:
        """What says who is correct."""
        return [one.accuracy for one in self.scored]

    @property
    def demonstration_reward(self) -> float:
        return self.demonstration_scored.reward if self.demonstration_scored else 0.0

    @property
    def demonstration_accuracy(self) -> float:
        return self.demonstration_scored.accuracy if self.demonstration_scored else 0.0


@dataclasses.dataclass(frozen=True)
class Experience:
    """What one step has sampled.

    Attributes:
        sampled: Every group.
        groups: Those to be trained on; fewer than asked for where the refills did not suffice.
        refills: Rollouts of further prompts.
        dropped: Groups left out as their rewards are all equal.
        rollouts: The first one, then the refills.
    """

    sampled: list[Group]
    groups: list[Group]
    refills: int
    dropped: int
    rollouts: list[Rollout]


ScoredDemonstrations = dict[tuple[int, int], Scored]  # by example and number within the example


def verify_demonstrations(setup: Setup, pool: RewardPool) -> ScoredDemonstrations:
    """The verdict on every demonstration.

    What is verified is what is trained on, decoded like a completion; each process verifies its
    share. Empty for an objective without rollouts, where no reward is used.
    """
    if not (setup.objective.uses_rollouts and setup.objective.uses_demonstrations):
        return {}
    keys = [
        (i, n) for i, one in enumerate(setup.encoded.train) for n in range(len(one.demonstrations))
    ]
    own = keys[jax.process_index() :: jax.process_count()]
    tokens = [setup.encoded.train[index].demonstrations[number].tolist() for index, number in own]
    scored = verify(
        pool,
        [setup.sets.train[index] for index, _ in own],
        [completion_text(setup.tokenizer, ids) for ids in tokens],
        [len(ids) for ids in tokens],
        setup.config.rewards.shaping,
    )
    verdicts = dict(itertools.chain(*gathered(list(zip(own, scored, strict=True)))))
    return {key: verdicts[key] for key in keys}


def describe_demonstrations(setup: Setup, scored: ScoredDemonstrations) -> list[str]:
    """How many demonstrations are right, and which one is not; it is trained on all the same."""
    threshold = setup.config.rewards.correct_threshold
    wrong = [key for key, one in scored.items() if one.accuracy < threshold]
    lines = [f"demonstrations verified right: {len(scored) - len(wrong)} of {len(scored)}"]
    if wrong:
        index, number = wrong[0]
        example, verdict = setup.sets.train[index], scored[wrong[0]].verdict
        lines.append(
            f"WARNING: {place(example, 'train', index + 1)}: the verdict of {example.kind} on "
            f"demonstration {number + 1} is {verdict} (answer {example.answer!r}); such rows are "
            "trained on all the same"
        )
    return lines if scored else []


@functools.partial(jax.profiler.annotate_function, name="rollout")
def collect(
    setup: Setup,
    stage: Stage,
    step: int,
    params: Params,
    streams: Streams,
    pool: RewardPool,
    demonstrations: ScoredDemonstrations,
    observer: Observer | None = None,
) -> Experience:
    """Samples and verifies a group for each prompt of the step.

    With `drop_zero_std`, further prompts replace the groups left out, `max_refills` times at most.

    Args:
        setup: Of the run.
        stage: Of the step.
        step: From 1.
        params: The current policy.
        streams: Where the prompts come from.
        pool: Verifiers.
        demonstrations: As made by `verify_demonstrations`.
        observer: Called with the sampler's progress.
    """
    objective, wanted = stage.objective, setup.config.data.prompts_per_step
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(setup.config.seed), 1), step)
    rollouts: list[Rollout] = []
    sampled: list[Group] = []
    kept: list[Group] = []
    for refill in range(objective.max_refills + 1):
        prompts = streams.prompts(objective)
        key_here = jax.random.fold_in(key, refill) if refill else key
        rollouts.append(_sample(setup, stage, step, params, prompts, key_here, pool, observer))
        groups = _groups(setup, objective, prompts, rollouts[-1].groups, demonstrations)
        sampled += groups
        kept += [group for group in groups if not _is_dropped(group, objective)]
        if len(kept) >= wanted:
            break
    dropped = sum(_is_dropped(group, objective) for group in sampled)
    return Experience(sampled, kept[:wanted], refill, dropped, rollouts)


def _is_dropped(group: Group, objective: Objective) -> bool:
    """Unwanted, as the verifier's rewards are all equal.

    Neither shaping nor the overlong penalty is looked at: hardly two lengths are equal.
    """
    accuracies = group.accuracies
    if group.demonstration is not None and objective.advantage_group == "augmented":
        accuracies = [*accuracies, group.demonstration_accuracy]
    return objective.drop_zero_std and len(set(accuracies)) == 1


def _groups(
    setup: Setup,
    objective: Objective,
    prompts: PromptBatch,
    members: Sequence[Sequence[Verified]],
    demonstrations: ScoredDemonstrations,
) -> list[Group]:
    with_groups = objective.trains_demonstrations and objective.demo_source == "group"
    return [
        Group(
            example=pair[0],
            completions=[completion for completion, _ in own],
            scored=[scored for _, scored in own],
            demonstration=pair[1] if with_groups and pair[1] != NO_DEMONSTRATION else None,
            demonstration_scored=demonstrations.get(pair),
        )
        for pair, own in zip(prompts.pairs(), members, strict=True)
    ]


def _sample(
    setup: Setup,
    stage: Stage,
    step: int,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    pool: RewardPool,
    observer: Observer | None,
) -> Rollout:
    """A group for each prompt; empty ones for an objective without rollouts."""
    if not stage.objective.uses_rollouts:
        return Rollout([[] for _ in prompts.example], NO_PROGRESS, 0.0)
    of_prompts = [_requests(setup, stage, step, *pair) for pair in prompts.pairs()]
    owners = zip(prompts.example, of_prompts, strict=True)
    rollout = sample_verified(
        params,
        setup.model_config,
        [request for one in of_prompts for request in one],
        [setup.sets.train[index] for index, one in owners for _ in one],
        key,
        setup.rollout_sampling,
        setup.tokenizer,
        pool,
        observer,
        setup.config.rewards.shaping,
    )
    of_requests = iter(rollout.groups)
    groups = [[member for _ in one for member in next(of_requests)] for one in of_prompts]
    return dataclasses.replace(rollout, groups=groups)


def _requests(
    setup: Setup, stage: Stage, step: int, example: int, demonstration: int
) -> list[Request]:
    """One group: all alike, or a last one apart that starts with a part of the demonstration."""
    size = setup.config.rollout.completions_per_prompt
    prompt, stop_ids = setup.encoded.train[example].prompt, setup.tokenizer.stop_ids
    forced = _forced(setup, stage, step, example, demonstration)
    if not forced or stage.objective.prefix == "all":
        return [Request(prompt, size, forced, stop_ids=stop_ids)]
    plain = Request(prompt, size - 1, stop_ids=stop_ids)
    return [plain, Request(prompt, 1, forced, stop_ids=stop_ids)]


def _forced(
    setup: Setup, stage: Stage, step: int, example: int, demonstration: int
) -> Sequence[int]:
    """The part of the demonstration that completions start with; its end, EOS, is never in it."""
    if stage.objective.prefix == "none" or demonstration == NO_DEMONSTRATION:
        return ()
    tokens = setup.encoded.train[example].demonstrations[demonstration]
    rng = np.random.default_rng((setup.config.seed, step, example))
    length = prefix_length(stage.objective, stage.number(step), len(tokens), rng)
    return tuple(tokens[:length].tolist())


def overlong(setup: Setup, objective: Objective, completion: Completion) -> float:
    """What is added to the reward that advantages are taken over; at most 0."""
    if not objective.overlong_buffer:
        return 0.0
    cap = setup.config.rollout.max_new_tokens
    return overlong_penalty(len(completion.tokens), cap, objective.overlong_buffer)
