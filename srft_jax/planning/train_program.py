"""The train step as a run compiles it, lowered from abstract shapes: nothing is allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from srft_jax.batch import Batch, Normalisers, TrainState
from srft_jax.config import AdaptedModelConfig
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.rows import empty_rows
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.training.microbatch import FixedParams, StepInputs
from srft_jax.training.state import abstract_params, abstract_state, with_shardings
from srft_jax.training.updates import batch_shardings, make_stage_functions


def lowered_train_step(run: PlannedRun) -> jax.stages.Lowered:
    """Return the step of the policy's stage; its `.compile()` has XLA's accounting of it.

    The devices of the run's mesh need not exist: those of a topology can be compiled for.
    """
    stage = run.stages.policy
    functions = make_stage_functions(stage, run.forward, run.optimizers[stage.optimizer])
    step: Any = functions.train_step  # jitted, so it can be lowered
    # Before the mesh is set: Optax makes small arrays on the way, which need real devices.
    inputs = StepInputs(train_state(run), abstract_batch(run), fixed_params(run))
    with jax.set_mesh(run.mesh):
        return step.lower(*inputs)


def train_state(run: PlannedRun) -> TrainState:
    """Return the shapes and shardings of the train state."""
    return abstract_state(run.model_config, run.optimizers, run.mesh)


def fixed_params(run: PlannedRun) -> FixedParams:
    """Return the abstract parameters that a step only reads: frozen ones, and the reference's."""
    frozen: Params = {}
    if isinstance(run.model_config, AdaptedModelConfig):
        dtype = run.model_config.lora.base_dtype
        frozen = lora.frozen(abstract_params(run.model_config, run.mesh, dtype), run.model_config)
    if not run.objective.uses_reference:
        return FixedParams(frozen)
    if run.base_is_reference:
        return FixedParams(frozen, frozen)
    return FixedParams(frozen, abstract_params(lora.base(run.model_config), run.mesh))


def abstract_batch(run: PlannedRun) -> Batch:
    """Return the shapes [M, B, T] and shardings of a batch of the policy's stage."""
    training = run.training
    shape = (run.num_microbatches(run.stages.policy), training.rows, training.row_length)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    num_used: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = Batch(
        rows=jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype), empty_rows((1, 1, 1))),
        normalisers=Normalisers(
            **{field.name: number for field in dataclasses.fields(Normalisers)}
        ),
        num_microbatches=num_used,
        on_policy=training.updates_per_rollout == 1,  # as far as a plan can know
    )
    return with_shardings(shapes, batch_shardings(shapes, run.mesh))
