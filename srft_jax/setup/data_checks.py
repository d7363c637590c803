"""Checks of the data: it has what the objective trains on, and verifiers for all of its rows."""

from srft_jax.config import Objective, RewardsConfig, UsageError
from srft_jax.data.encoding import EncodedSets
from srft_jax.data.problems import raise_problems
from srft_jax.data.verifier_requests import row_problems


def check_data(
    data: EncodedSets,
    objective: Objective,
    rewards: RewardsConfig,
    *,
    preset: str,
    prompts_per_step: int,
    max_demonstration_tokens: int,
) -> None:
    """Check that there are enough prompts and demonstrations, and that rows can be verified.

    Raises:
        UsageError: with the numbers that do not go together, or the rows that nothing can verify.
    """
    demonstrated = sum(bool(problem.demonstrations) for problem in data.train)
    if objective.uses_demonstrations and not demonstrated:
        raise UsageError(
            f"objective.preset = {preset} trains on demonstrations, but no training prompt has one"
            + _lost_demonstrations(data, max_demonstration_tokens)
        )
    # Nothing is learned from a prompt alone where there are no rollouts.
    only_demonstrated = objective.sft_steps or not objective.uses_rollouts
    usable = demonstrated if only_demonstrated else len(data.train)
    if prompts_per_step > usable:
        raise UsageError(
            f"data.prompts_per_step = {prompts_per_step} exceeds the {usable} prompts that "
            f"objective.preset = {preset} can train on"
        )
    if objective.demo_source == "own" and objective.demo_per_step > demonstrated:
        raise UsageError(
            f"objective.demo_per_step = {objective.demo_per_step} exceeds the {demonstrated} "
            "training prompts with a demonstration"
        )
    raise_problems(list(row_problems(data.texts, rewards.shaping, rewards.options)))


def _lost_demonstrations(data: EncodedSets, limit: int) -> str:
    """The end of a sentence, where demonstrations were dropped."""
    lost = data.dropped["train"].demonstrations
    if not lost:
        return ""
    return f": {lost} were dropped, longer than data.max_demonstration_tokens = {limit}"
