"""A run checked for a plan: as a run is, but without weights, tokenizer and data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srft_jax.config import ModelConfig, Objective, RunConfig, UsageError
from srft_jax.mesh import make_mesh
from srft_jax.models import lora
from srft_jax.models.hf_config import read_config
from srft_jax.setup.config_checks import check_config
from srft_jax.setup.outline import Outline, check_sizes, expanded, overridden


def outline_for_plan(config: RunConfig, devices: Sequence[Any]) -> Outline:
    """Return what the programs of a run on these devices are compiled from.

    Raises:
        UsageError: the configuration cannot be run; the message names the key.
    """
    config, objective = expanded(config)
    check_config(config)
    _check_length("mean_prompt", config.plan.mean_prompt, config.data.max_prompt_tokens)
    _check_length("mean_completion", config.plan.mean_completion, longest_answer(config, objective))
    model = lora.adapted(_architecture(config), config.model.lora)
    run = Outline(config, objective, model, make_mesh(config.mesh, devices))
    check_sizes(run)
    return run


def longest_answer(config: RunConfig, objective: Objective) -> int:
    """Return the most tokens after a prompt: of a completion, without rollouts a demonstration."""
    completion, demonstration = config.rollout.max_new_tokens, config.max_demonstration_tokens
    return completion if objective.uses_rollouts else demonstration


def _check_length(key: str, mean: int | None, longest: int) -> None:
    if mean is not None and not 1 <= mean <= longest:
        raise UsageError(f"plan.{key} = {mean} is not from 1 to the longest, {longest}")


def _architecture(config: RunConfig) -> ModelConfig:
    """Return the architecture of the model if it is there, else of what stands in for it."""
    section = config.model
    if section.path is not None and (Path(section.path) / "config.json").is_file():
        return overridden(read_config(Path(section.path)), section)
    if (stand_in := config.plan.architecture or section.architecture) is not None:
        return overridden(read_config(Path(stand_in)), section)
    raise UsageError(
        f"model.path = {section.path} holds no config.json to plan from; set plan.architecture to "
        "one or to its directory, e.g. in assets/architectures/"
    )
