"""The run that is planned: checked as a run is, but for weights, tokenizer and data."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srft_jax.config import ModelConfig, RunConfig, UsageError
from srft_jax.mesh import make_mesh
from srft_jax.models import lora
from srft_jax.models.hf_config import read_config
from srft_jax.planning.workload import longest_answer
from srft_jax.setup.config_checks import check_config
from srft_jax.setup.outline import Outline, check_sizes, expanded, overridden


def planned_run(config: RunConfig, devices: Sequence[Any]) -> Outline:
    """What the programs of a run on these devices are compiled from.

    Raises:
        UsageError: naming the key that cannot be run.
    """
    config, objective = expanded(config)
    check_config(config)
    _check_length("mean_prompt", config.plan.mean_prompt, config.data.max_prompt_tokens)
    longest = longest_answer(config, objective)
    _check_length("mean_completion", config.plan.mean_completion, longest)
    model = lora.adapted(_architecture(config), config.model.lora)
    run = Outline(config, objective, model, make_mesh(config.mesh, devices))
    check_sizes(run)
    return run


def _check_length(key: str, mean: int | None, longest: int) -> None:
    if mean is not None and not 1 <= mean <= longest:
        raise UsageError(f"plan.{key} = {mean} is not from 1 to the longest, {longest}")


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """With other values in some sections: changed(config, mesh={"fsdp": 4})."""
    values: Any = {
        name: dataclasses.replace(vars(config)[name], **of_section)
        for name, of_section in sections.items()
    }
    return dataclasses.replace(config, **values)


def _architecture(config: RunConfig) -> ModelConfig:
    """Of the model if it is there, else what stands in for it."""
    section = config.model
    if section.path is not None and (Path(section.path) / "config.json").is_file():
        return overridden(read_config(Path(section.path)), section)
    if (stand_in := config.plan.architecture or section.architecture) is not None:
        return overridden(read_config(Path(stand_in)), section)
    raise UsageError(
        f"model.path = {section.path} holds no config.json to plan from; set plan.architecture to "
        "one or to its directory, e.g. in assets/architectures/"
    )
