"""Optimizer steps on the mesh: the compiled functions of each stage, and their application."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import Batch, Metrics, TrainState
from srft_jax.experience.batches import Update
from srft_jax.mesh import placed, sharding
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stage
from srft_jax.training.logprobs import make_old_logprobs
from srft_jax.training.metrics import present
from srft_jax.training.microbatch import FixedParams, ForwardOptions, StepInputs
from srft_jax.training.state import updates_made
from srft_jax.training.step import TrainStep, make_gradient_norms, make_train_step


@dataclasses.dataclass(frozen=True)
class StageFunctions:
    """The compiled functions of a stage.

    Attributes:
        train_step: Makes one update; the state is donated.
        gradient_norms: Takes the gradient norm of each loss term alone.
        old_logprobs: Fills in the trainer's log-probs under all parameters of the policy; None for
            an objective that takes the sampler's.
    """

    train_step: TrainStep
    gradient_norms: Callable[[StepInputs], Metrics]
    old_logprobs: Callable[[Params, Batch], Batch] | None


def make_stage_functions(
    stage: Stage, options: ForwardOptions, optimizer: optax.GradientTransformation
) -> StageFunctions:
    """Return the functions of a stage; nothing compiles before one is called.

    Args:
        stage: Objective, and the name of its optimizer.
        options: Architecture, runtime, temperature, memory for logits.
        optimizer: The optimizer of that name.
    """
    objective = stage.objective
    return StageFunctions(
        train_step=make_train_step(options, objective, optimizer, optimizer_name=stage.optimizer),
        gradient_norms=make_gradient_norms(options, objective),
        old_logprobs=make_old_logprobs(options) if objective.old_logprobs == "trainer" else None,
    )


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Return the batch on the devices: rows split over the data-parallel ones, counts on all.

    Every process has the whole batch.
    """
    return placed(batch, batch_shardings(batch, mesh))


def batch_shardings(batch: Batch, mesh: Mesh) -> Any:
    """Return the sharding of each array of a batch, which may be abstract."""
    axes = {3: (None, "batch", None), 0: ()}
    return jax.tree.map(lambda x: sharding(mesh, axes[x.ndim], x.shape), batch)


def prepare_batch(
    functions: StageFunctions, state: TrainState, batch: Batch, mesh: Mesh, fixed: FixedParams
) -> Batch:
    """Return the batch on the devices, with the log-probs under the state's parameters filled in
    where the objective takes the trainer's.

    Args:
        functions: Compiled functions of the batch's stage.
        state: State before the first update of the batch's rollout.
        batch: Batch, the whole of it on every process.
        mesh: Devices.
        fixed: Frozen parameters, and those of the reference.
    """
    batch = put(batch, mesh)
    if functions.old_logprobs is not None and not batch.on_policy:  # else they are the step's own
        batch = functions.old_logprobs(lora.whole(fixed.frozen, state.params), batch)
    return batch


@functools.partial(jax.profiler.annotate_function, name="train")
def apply(
    functions: Mapping[Stage, StageFunctions],
    state: TrainState,
    updates: Sequence[Update],
    mesh: Mesh,
    *,
    fixed: FixedParams,
    measure_norms: bool,
) -> tuple[TrainState, list[Metrics]]:
    """Make the updates of one rollout in turn.

    Args:
        functions: Compiled functions of each stage.
        state: State before the first update; it is donated.
        updates: Stage and batch of each update.
        mesh: Devices.
        fixed: Frozen parameters, and those of the reference.
        measure_norms: Take each term's gradient norm before every update.

    Returns:
        The state after the last update, and the metrics of each.
    """
    # The trainer's old log-probs are those before the first update, for all batches of the rollout.
    batches = [
        prepare_batch(functions[update.stage], state, update.batch, mesh, fixed)
        for update in updates
    ]
    metrics = []
    for update, batch in zip(updates, batches, strict=True):
        stage_functions = functions[update.stage]
        inputs = StepInputs(state, batch, fixed)
        norms = stage_functions.gradient_norms(inputs) if measure_norms else {}
        state, step_metrics = stage_functions.train_step(*inputs)
        values = present(step_metrics, update.batch.normalisers, update.stage.objective) | norms
        metrics.append({update.stage.label + name: value for name, value in values.items()})
    return state, metrics


def update_metrics(
    updates: Sequence[Update], state: TrainState, learning_rates: Mapping[str, optax.Schedule]
) -> dict[str, float]:
    """Return the number of a step's updates, and the learning rate of each stage's first one.

    Args:
        updates: Updates of the step.
        state: State before the first of them.
        learning_rates: Schedule of each optimizer, by name.
    """
    values = {"optimizer/updates": float(len(updates))}
    for stage in dict.fromkeys(update.stage for update in updates):
        rate = learning_rates[stage.optimizer](updates_made(state, stage.optimizer))
        values[f"{stage.label}optimizer/learning_rate"] = float(rate)
    return values
