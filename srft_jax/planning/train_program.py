"""The train step as a run compiles it, lowered from abstract shapes: nothing is allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srft_jax.batch import Batch, Normalisers, TrainState
from srft_jax.config import ModelConfig, Objective, RunConfig
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.rows import empty_rows
from srft_jax.objectives.stages import Stage
from srft_jax.setup.outline import Outline
from srft_jax.training.loading import abstract_params
from srft_jax.training.optimizer import Optimizers, make_optimizers
from srft_jax.training.state import abstract_state, with_shardings
from srft_jax.training.updates import batch_shardings, make_stage_functions


def lowered_train_step(
    config: RunConfig, model_config: ModelConfig, objective: Objective, mesh: Mesh
) -> jax.stages.Lowered:
    """The step of the run's last stage, whose `.compile()` gives XLA's accounting of it.

    Args:
        config: Of the run, the preset expanded.
        model_config: Architecture, with its adapters where `model.lora` is set.
        objective: Coefficients of the loss.
        mesh: Devices, which need not be there: those of a topology can be compiled for.
    """
    run = Outline(config, objective, model_config, mesh)
    stage = run.stages.policy
    # A partial of a compiled function, which is what can be lowered.
    frozen, reference = fixed_params(run)
    transformations = optimizers(run).transformations
    step: Any = make_stage_functions(
        stage,
        model_config,
        transformations[stage.optimizer],
        temperature=config.rollout.temperature,
        runtime=run.runtime,
        logits_mib=config.training.logits_mib,
        frozen_params=frozen,
        reference_params=reference,
    ).train_step
    # Made outside of the mesh: Optax makes small arrays on the way, for which it needs devices.
    state = train_state(run)
    batch = abstract_batch(run, stage)
    with jax.set_mesh(mesh):
        return step.func.lower(*step.args, state, batch)


def optimizers(run: Outline) -> Optimizers:
    """Return the optimizers of the run's stages."""
    return make_optimizers(
        run.config.training,
        run.stages,
        prompts_per_step=run.config.data.prompts_per_step,
        model_config=run.model_config,
    )


def train_state(run: Outline) -> TrainState:
    """Return the shapes and shardings of the train state."""
    return abstract_state(optimizers(run).transformations, run.model_config, run.mesh)


def fixed_params(run: Outline) -> tuple[Params, Params | None]:
    """What the step reads and does not change: frozen parameters, and those of the reference."""
    section, frozen = run.config.model, {}
    if section.lora is not None:
        of_base = abstract_params(run.model_config, run.mesh, section.lora.base_dtype)
        frozen = lora.frozen(of_base, run.model_config)
    if not run.objective.uses_reference:
        return frozen, None
    own = abstract_params(lora.base(run.model_config), run.mesh)
    return frozen, frozen if run.base_is_reference else own


def abstract_batch(run: Outline, stage: Stage) -> Batch:
    """Shapes and places of a stage's batches [M, B, T]."""
    training = run.config.training
    shape = (run.num_microbatches(stage), training.rows, training.row_length)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    num_used: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = Batch(
        rows=jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype), empty_rows((1, 1, 1))),
        normalisers=Normalisers(*len(dataclasses.fields(Normalisers)) * [number]),
        num_microbatches=num_used,
        on_policy=training.updates_per_rollout == 1,  # as far as a plan can know
    )
    return with_shardings(shapes, batch_shardings(shapes, run.mesh))
