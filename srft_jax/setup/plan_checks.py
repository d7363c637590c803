"""A run checked for a plan: as a run is, but without weights, tokenizer and data."""

from collections.abc import Sequence
from typing import Any

from srft_jax.config import Objective, RunConfig, UsageError
from srft_jax.setup.architecture import planned_architecture
from srft_jax.setup.config_checks import check_config
from srft_jax.setup.outline import Outline, make_outline, with_coefficients


def outline_for_plan(config: RunConfig, devices: Sequence[Any]) -> Outline:
    """Return what the programs of a run on these devices are compiled from.

    Raises:
        UsageError: the configuration cannot be run; the message names the key.
    """
    config = with_coefficients(config)
    check_config(config)
    architecture = planned_architecture(config.model, config.plan.architecture)
    run = make_outline(config, architecture, devices)
    longest = longest_trained_answer(config, run.objective)
    _check_length("mean_prompt", config.plan.mean_prompt, config.data.max_prompt_tokens)
    _check_length("mean_completion", config.plan.mean_completion, longest)
    return run


def longest_trained_answer(config: RunConfig, objective: Objective) -> int:
    """Return the most tokens after a prompt: of a completion, without rollouts a demonstration."""
    completion, demonstration = config.rollout.max_new_tokens, config.longest_demonstration
    return completion if objective.uses_rollouts else demonstration


def _check_length(key: str, mean: int | None, longest: int) -> None:
    if mean is not None and not 1 <= mean <= longest:
        raise UsageError(f"plan.{key} = {mean} is not from 1 to the longest, {longest}")
