"""The outline of a run: what its programs are compiled from, with neither data nor weights.

A run adds tokenizer and data (prepare.py); a plan needs neither (plan_checks.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from srft_jax.config import ModelConfig, Objective, ObjectiveConfig, RunConfig
from srft_jax.mesh import make_mesh
from srft_jax.models import lora
from srft_jax.models.decoder import Runtime
from srft_jax.objectives.methods import expand
from srft_jax.objectives.stages import Stages, make_stages
from srft_jax.rollout import SamplingConfig
from srft_jax.setup.attention_kernel import resolve_attention
from srft_jax.setup.model_checks import check_sizes


@dataclasses.dataclass(frozen=True)
class Outline:
    """What all of a run's programs are compiled from.

    Attributes:
        config: The configuration, with the coefficients of the objective's preset filled in.
        stages: Objectives of the run.
        model_config: Architecture, with its adapters where `model.lora` is set.
        runtime: Precision, rematerialisation and attention kernel of the train step.
        sampling: What the run's sampler is made for; evaluations name their own limits.
        mesh: Devices.
    """

    config: RunConfig
    stages: Stages
    model_config: ModelConfig
    runtime: Runtime
    sampling: SamplingConfig
    mesh: Mesh

    @property
    def objective(self) -> Objective:
        """The configured objective."""
        return self.stages.policy.objective


def make_outline(
    config: RunConfig, architecture: ModelConfig, devices: Sequence[Any] | None = None
) -> Outline:
    """Return the outline of a run, its sizes checked.

    Args:
        config: With the preset's coefficients filled in, see `with_coefficients`.
        architecture: Without adapters.
        devices: Devices to lay the mesh over; None takes those of this machine.

    Raises:
        UsageError: naming the key that does not suit the model or the devices.
    """
    model_config = lora.adapted(architecture, config.model.lora)
    mesh = make_mesh(config.mesh, devices)
    platform = mesh.devices.flat[0].platform
    dtype, rollout = config.model.dtype, config.rollout
    attention = resolve_attention(config.model.attention, platform, model_config, dtype)
    check_sizes(config, model_config, mesh)
    return Outline(
        config=config,
        stages=make_stages(
            expand(config.objective),
            num_steps=config.training.num_steps,
            prompts_per_step=config.data.prompts_per_step,
            updates_per_rollout=config.training.updates_per_rollout,
            completions_per_prompt=rollout.completions_per_prompt,
        ),
        model_config=model_config,
        runtime=Runtime(dtype=dtype, remat=config.model.remat, attention=attention),
        sampling=SamplingConfig(
            temperature=rollout.temperature,
            truncation=rollout.truncation,
            max_new_tokens=rollout.max_new_tokens,
            slots=rollout.slots,
            segment=rollout.segment,
            cache_mib=rollout.cache_mib,
            dtype=dtype,
            attention=attention,
            tensor=rollout.tensor,
        ),
        mesh=mesh,
    )


def with_coefficients(config: RunConfig) -> RunConfig:
    """Return the configuration with its preset's coefficients filled in, as it is stored."""
    preset = config.objective.preset
    filled = ObjectiveConfig(
        preset=preset, expanded_from=preset, **dataclasses.asdict(expand(config.objective))
    )
    return dataclasses.replace(config, objective=filled)
