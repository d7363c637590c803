"""The outline of a run: what its programs are compiled from, with neither data nor weights.

A run adds these (setup.py); a plan never does (planning/).
"""

import dataclasses

from jax.sharding import Mesh

from srft_jax.config import (
    ModelConfig,
    ModelSection,
    Objective,
    ObjectiveConfig,
    RunConfig,
    UsageError,
)
from srft_jax.mesh import decode_mesh
from srft_jax.models.decoder import Runtime
from srft_jax.models.hf_config import check_architecture
from srft_jax.objectives.methods import expand
from srft_jax.objectives.stages import Stage, Stages, make_stages
from srft_jax.ops.attention import Kernel
from srft_jax.rollout import SamplingConfig
from srft_jax.setup.attention_kernel import resolve_attention


@dataclasses.dataclass(frozen=True)
class Outline:
    """What all of a run's programs are compiled from.

    Attributes:
        config: As asked for, the objective's preset expanded.
        objective: Coefficients of the loss.
        model_config: Architecture, with its adapters where `model.lora` is set.
        mesh: Devices.
    """

    config: RunConfig
    objective: Objective
    model_config: ModelConfig
    mesh: Mesh

    def attention(self) -> Kernel:
        """That the devices and the model take; UsageError on one that they cannot."""
        model, device = self.config.model, self.mesh.devices.flat[0]
        return resolve_attention(model.attention, device.platform, self.model_config, model.dtype)

    def decode_mesh(self) -> Mesh:
        """The mesh as rollouts and evaluations lay it out; UsageError where they cannot."""
        return decode_mesh(self.mesh, self.config.rollout.tensor)

    @property
    def runtime(self) -> Runtime:
        model = self.config.model
        return Runtime(dtype=model.dtype, remat=model.remat, attention=self.attention())

    @property
    def sampling(self) -> SamplingConfig:
        """What the run's sampler is made for; evaluations name their own limits."""
        rollout = self.config.rollout
        return SamplingConfig(
            temperature=rollout.temperature,
            truncation=rollout.truncation,
            max_new_tokens=rollout.max_new_tokens,
            slots=rollout.slots,
            segment=rollout.segment,
            cache_mib=rollout.cache_mib,
            dtype=self.config.model.dtype,
            attention=self.attention(),
            tensor=rollout.tensor,
        )

    @property
    def longest_sequence(self) -> int:
        """Inputs of the longest prompt and completion; the last token is a target only."""
        return self.config.longest_sequence

    @property
    def base_is_reference(self) -> bool:
        """The frozen parameters of a run with LoRA are those of the reference policy."""
        return self.config.model.lora is not None and self.config.model.reference is None

    @property
    def reference_path(self) -> str | None:
        """Hugging Face directory of the reference policy."""
        return self.config.model.reference or self.config.model.path

    @property
    def stages(self) -> Stages:
        """The stages of the run."""
        return make_stages(
            self.objective,
            prompts_per_step=self.config.data.prompts_per_step,
            updates_per_rollout=self.config.training.updates_per_rollout,
            completions_per_prompt=self.config.rollout.completions_per_prompt,
        )

    def num_microbatches(self, stage: Stage) -> int:
        """M, the static number of microbatches of the stage's batches."""
        return stage.num_microbatches(self.longest_sequence, self.config.training)


def expanded(config: RunConfig) -> tuple[RunConfig, Objective]:
    """The configuration with its preset's coefficients filled in, and these."""
    objective = expand(config.objective)
    of_preset = ObjectiveConfig(
        preset=config.objective.preset,
        expanded_from=config.objective.preset,
        **dataclasses.asdict(objective),
    )
    return dataclasses.replace(config, objective=of_preset), objective


def overridden(architecture: ModelConfig, section: ModelSection) -> ModelConfig:
    """With what the run has in place of the model's own, and what it will export."""
    names = ("rope_theta", "max_positions", "rope_scaling")
    given = {name: value for name in names if (value := getattr(section, name)) is not None}
    changed = dataclasses.replace(architecture, **given)
    check_architecture(changed, "the model")
    return changed


def check_sizes(run: Outline) -> None:
    """Lengths beside the architecture's, rows beside the mesh, and the kernel beside both."""
    config, model = run.config, run.model_config
    run.attention()
    longest = config.data.max_prompt_tokens + max(
        config.rollout.max_new_tokens,
        config.max_demonstration_tokens,
        config.evaluation.max_new_tokens,
    )
    if longest > model.max_positions:
        raise UsageError(
            f"prompt and completion of up to {longest} tokens exceed "
            f"the model's {model.max_positions}"
        )
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    rows = config.training.rows_per_microbatch
    if rows != "auto" and rows % ways:
        raise UsageError(
            f"training.rows_per_microbatch = {rows} does not split "
            f"over the {ways} data-parallel devices of the mesh: it must be a multiple of {ways}"
        )
    chunks = 2 * run.mesh.shape["context"]
    if chunks > 2 and config.training.row_length % chunks:
        raise UsageError(
            f"training.row_length = {config.training.row_length} does not split into the {chunks} "
            f"chunks that mesh.context = {chunks // 2} takes, two for each device"
        )
