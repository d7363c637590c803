"""One step's experience: prompts in, verified groups out, ready to be trained on."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np

from srft_jax.batch import Role
from srft_jax.data.pipeline import NO_DEMONSTRATION, PromptBatch
from srft_jax.evaluation.verdicts import Scored, completion_text, verify, verify_groups
from srft_jax.models.decoder import Params
from srft_jax.objectives.advantages import group_advantages
from srft_jax.objectives.rows import TrainingSequence
from srft_jax.rewards import RewardPool
from srft_jax.rewards.requests import Verdict
from srft_jax.rollout.requests import Completion, Request, SamplingConfig
from srft_jax.rollout.scheduler import sample
from srft_jax.tasks.setup import Setup


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt, its completions and the demonstration drawn for it.

    Attributes:
        example: Index of the training example.
        completions: Sampled by the policy; none for an objective without rollouts.
        scored: The verdict on each.
        demonstration: Ids, or None.
        demonstration_reward: What the same verifier says of it.
    """

    example: int
    completions: Sequence[Completion]
    scored: Sequence[Scored]
    demonstration: Sequence[int] | None
    demonstration_reward: float


def verify_demonstrations(setup: Setup, pool: RewardPool) -> dict[tuple[int, int], float]:
    """Reward of every demonstration, by example and number within the example.

    What is verified is what is trained on, decoded like a completion. Empty for an objective
    without rollouts, where no reward is used.
    """
    if not (setup.objective.uses_rollouts and setup.objective.uses_demonstrations):
        return {}
    keys = [
        (i, n) for i, one in enumerate(setup.encoded.train) for n in range(len(one.demonstrations))
    ]
    texts = [
        completion_text(setup.tokenizer, setup.encoded.train[index].demonstrations[number])
        for index, number in keys
    ]
    scored = verify(pool, [setup.sets.train[index] for index, _ in keys], texts)
    return {key: one.reward for key, one in zip(keys, scored, strict=True)}


def describe_demonstrations(setup: Setup, rewards: dict[tuple[int, int], float]) -> list[str]:
    """How many demonstrations are right, and which one is not; it is trained on all the same."""
    threshold = setup.config.rewards.correct_threshold
    wrong = [key for key, reward in rewards.items() if reward < threshold]
    lines = [f"demonstrations verified right: {len(rewards) - len(wrong)} of {len(rewards)}"]
    if wrong:
        index, number = wrong[0]
        lines.append(
            f"WARNING: train, row {index + 1}: the verifier calls demonstration {number + 1} wrong "
            f"(answer {setup.sets.train[index].answer!r}); such rows are trained on all the same"
        )
    return lines if rewards else []


def collect(
    setup: Setup,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    pool: RewardPool,
    demonstration_rewards: dict[tuple[int, int], float],
) -> list[Group]:
    """Samples and verifies a group for each prompt.

    Args:
        setup: Of the run.
        params: The current policy.
        prompts: Which examples, and which of their demonstrations.
        key: Of this step.
        pool: Verifiers.
        demonstration_rewards: As made by `verify_demonstrations`.
    """
    examples = [setup.sets.train[i] for i in prompts.example]
    completions = _sample(setup, params, prompts, key)
    scored = verify_groups(pool, examples, completions, setup.tokenizer)
    groups = []
    for i, number, own, verdicts in zip(
        prompts.example, prompts.demonstration, completions, scored, strict=True
    ):
        given = number != NO_DEMONSTRATION and setup.objective.uses_demonstrations
        groups.append(
            Group(
                example=int(i),
                completions=own,
                scored=verdicts,
                demonstration=setup.encoded.train[i].demonstrations[number] if given else None,
                demonstration_reward=demonstration_rewards.get((int(i), int(number)), 0.0),
            )
        )
    return groups


def _sample(
    setup: Setup, params: Params, prompts: PromptBatch, key: jax.Array
) -> list[list[Completion]]:
    """A group for each prompt; empty ones for an objective without rollouts."""
    if not setup.objective.uses_rollouts:
        return [[] for _ in prompts.example]
    rollout, stop_ids = setup.config.rollout, (setup.tokenizer.eos_id,)
    sampling = SamplingConfig(
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        slots=rollout.slots,
        segment=rollout.segment,
        dtype=setup.config.model.dtype,
    )
    requests = [
        Request(setup.encoded.train[i].prompt, rollout.completions_per_prompt, stop_ids=stop_ids)
        for i in prompts.example
    ]
    return sample(params, setup.model_config, requests, key, sampling)


def training_sequences(setup: Setup, group: Group) -> list[TrainingSequence]:
    """The augmented group as sequences, advantages and correctness filled in."""
    objective, threshold = setup.objective, setup.config.rewards.correct_threshold
    prompt = setup.encoded.train[group.example].prompt
    rewards = [scored.reward for scored in group.scored]
    has_demonstration = group.demonstration is not None
    advantages, demo_advantages = group_advantages(
        rewards,
        [group.demonstration_reward] if has_demonstration else [],
        augmented=objective.advantage_group == "augmented",
        divide_by_std=objective.advantage_std,
    )
    sequences = [
        TrainingSequence(
            prompt,
            completion.tokens,
            Role.SELF,
            advantage,
            reward >= threshold,
            completion.logprobs,
        )
        for completion, advantage, reward in zip(
            group.completions, advantages, rewards, strict=True
        )
    ]
    if group.demonstration is not None:
        correct = group.demonstration_reward >= threshold
        sequences.append(
            TrainingSequence(
                prompt, group.demonstration, Role.DEMONSTRATION, demo_advantages[0], correct
            )
        )
    return sequences


def metrics(setup: Setup, groups: Sequence[Group]) -> dict[str, float]:
    """Means over completions and shares of groups; empty for an objective without rollouts."""
    scored = [one for group in groups for one in group.scored]
    if not scored:
        return {}
    completions = [one for group in groups for one in group.completions]
    threshold = setup.config.rewards.correct_threshold
    solved = [np.mean([one.reward >= threshold for one in group.scored]) for group in groups]
    verdicts = Counter(one.verdict for one in scored)
    return {
        "rollout/reward": float(np.mean([one.reward for one in scored])),
        "rollout/accuracy": float(np.mean([one.reward >= threshold for one in scored])),
        "rollout/length": float(np.mean([len(one.tokens) for one in completions])),
        "rollout/truncated": float(np.mean([not one.finished for one in completions])),
        "rollout/groups_zero_std": float(
            np.mean([np.ptp([one.reward for one in group.scored]) == 0 for group in groups])
        ),
        "rollout/groups_all_right": float(np.mean([share == 1 for share in solved])),
        "rollout/groups_all_wrong": float(np.mean([share == 0 for share in solved])),
    } | {f"rewards/{verdict}": verdicts[verdict] / len(scored) for verdict in get_args(Verdict)}


def sample_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The first completion of each group, as lines of samples.jsonl."""
    return [group.scored[0].row("rollout") for group in groups if group.scored]
