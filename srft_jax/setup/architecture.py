"""The architecture of a run: read from the model or from a config.json, then overridden."""

import dataclasses
from pathlib import Path

from srft_jax.config import ModelConfig, ModelSection, UsageError
from srft_jax.models.hf_config import check_architecture, read_config


def overridden(architecture: ModelConfig, model: ModelSection) -> ModelConfig:
    """Return the architecture with what the run puts in place of the model's own values.

    Exports have these values too.
    """
    names = ("rope_theta", "max_positions", "rope_scaling")
    given = {name: value for name in names if (value := getattr(model, name)) is not None}
    changed = dataclasses.replace(architecture, **given)
    check_architecture(changed, "the model")
    return changed


def run_architecture(model: ModelSection) -> ModelConfig:
    """Return the architecture of the weights that a run starts from.

    Raises:
        UsageError: not exactly one of `model.path` and `model.architecture` is set.
    """
    path, architecture = model.path, model.architecture
    if (path is None) == (architecture is None):
        raise UsageError("exactly one of model.path and model.architecture must be set")
    return overridden(read_config(Path(path or architecture or "")), model)


def planned_architecture(model: ModelSection, stand_in: str | None) -> ModelConfig:
    """Return the architecture of the model if it is there, else of what stands in for it.

    Args:
        model: Where the model is, or would be.
        stand_in: `plan.architecture`.

    Raises:
        UsageError: there is neither.
    """
    if model.path is not None and (Path(model.path) / "config.json").is_file():
        return overridden(read_config(Path(model.path)), model)
    if (path := stand_in or model.architecture) is not None:
        return overridden(read_config(Path(path)), model)
    raise UsageError(
        f"model.path = {model.path} holds no config.json to plan from; set plan.architecture to "
        "one or to its directory, e.g. in assets/architectures/"
    )
