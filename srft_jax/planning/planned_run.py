"""The run that a plan is about: what its programs are compiled from, without weights and data."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

from jax.sharding import Mesh

from srft_jax.config import (
    AdaptedModelConfig,
    MeshConfig,
    ModelConfig,
    Objective,
    TrainingConfig,
)
from srft_jax.mesh import decode_mesh, make_mesh
from srft_jax.objectives.stages import Stage, Stages, make_stages
from srft_jax.rollout import SamplingConfig
from srft_jax.training.microbatch import ForwardOptions
from srft_jax.training.optimizer import make_optimizers
from srft_jax.training.state import Transformations


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of what a run reads and writes.

    Attributes:
        longest_prompt: Most tokens of a prompt.
        longest_prefix: Most tokens of a demonstration that a completion starts with; 0 for an
            objective without prefixes. The sampler keeps them behind the prompt.
        longest_sequence: Input tokens of the longest training sequence.
        mean_prompt: Tokens of a prompt on average.
        mean_completion: Tokens of a completion on average.
    """

    longest_prompt: int
    longest_prefix: int
    longest_sequence: int
    mean_prompt: int
    mean_completion: int


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """What the programs of a run are compiled from, and how long its sequences are.

    Attributes:
        preset: Name of the method, for people.
        objective: Coefficients of the loss.
        forward: How the train step computes log-probs; architecture, precision, remat.
        mesh: Devices of the train step.
        training: Rows of a microbatch, updates per rollout, optimizers.
        sampling: Settings of rollouts, the longest completion among them.
        prompts_per_step: Prompts of one rollout.
        completions_per_prompt: G, which objectives without rollouts ignore.
        lengths: Tokens of prompts, completions and training sequences.
        base_is_reference: The reference policy is the frozen base of the adapters, not a copy.
    """

    preset: str
    objective: Objective
    forward: ForwardOptions
    mesh: Mesh
    training: TrainingConfig
    sampling: SamplingConfig
    prompts_per_step: int
    completions_per_prompt: int
    lengths: Lengths
    base_is_reference: bool

    @functools.cached_property
    def stages(self) -> Stages:
        """Objectives of the run."""
        return make_stages(
            self.objective,
            num_steps=self.training.num_steps,
            prompts_per_step=self.prompts_per_step,
            updates_per_rollout=self.training.updates_per_rollout,
            completions_per_prompt=self.completions_per_prompt,
        )

    @functools.cached_property
    def optimizers(self) -> Transformations:
        """Optimizers by name; a plan follows no learning rate."""
        return make_optimizers(self.training, self.stages, self.model_config).transformations

    @property
    def model_config(self) -> ModelConfig:
        """Architecture, with its adapters if any."""
        return self.forward.model_config

    @property
    def has_adapters(self) -> bool:
        """LoRA: the adapters are trained, all other parameters are frozen."""
        return isinstance(self.model_config, AdaptedModelConfig)

    @property
    def data_shards(self) -> int:
        """Parts that the rows of a microbatch are split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def tokens_on_device(self) -> float:
        """Tokens of a microbatch that one device reads."""
        rows = self.training.rows / self.data_shards
        return rows * self.training.row_length / self.mesh.shape["context"]

    def num_microbatches(self, stage: Stage) -> int:
        """Return M, the static number of microbatches of a stage's updates."""
        return stage.num_microbatches(self.lengths.longest_sequence, self.training)

    def decode_mesh(self) -> Mesh:
        """Return the mesh of rollouts and evaluations.

        Raises:
            UsageError: these devices cannot share a copy of the parameters as `sampling` asks.
        """
        return decode_mesh(self.mesh, self.sampling.tensor)

    def with_rows(self, rows: int) -> "PlannedRun":
        """Return the run with this number of rows in a microbatch."""
        training = dataclasses.replace(self.training, rows_per_microbatch=rows)
        return dataclasses.replace(self, training=training)

    def with_remat(self, remat: Literal["none", "dots", "block"]) -> "PlannedRun":
        """Return the run with this policy of rematerialisation."""
        runtime = dataclasses.replace(self.forward.runtime, remat=remat)
        return dataclasses.replace(self, forward=dataclasses.replace(self.forward, runtime=runtime))

    def on_mesh(
        self, sizes: MeshConfig, devices: Sequence[Any], *, rows_per_shard: int
    ) -> "PlannedRun":
        """Return the run on another mesh, with so many rows on each data-parallel device."""
        moved = dataclasses.replace(self, mesh=make_mesh(sizes, devices))
        return moved.with_rows(rows_per_shard * moved.data_shards)
