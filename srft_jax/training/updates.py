"""Optimizer steps on the mesh: the compiled functions of each stage, and their application."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import Batch, Metrics, TrainState
from srft_jax.config import ModelConfig
from srft_jax.experience.batches import Update
from srft_jax.mesh import placed, sharding
from srft_jax.models import lora
from srft_jax.models.decoder import Params, Runtime
from srft_jax.objectives.stages import Stage
from srft_jax.training.logprobs import make_old_logprobs
from srft_jax.training.metrics import present
from srft_jax.training.state import updates_made
from srft_jax.training.step import TrainStep, make_gradient_norms, make_train_step


@dataclasses.dataclass(frozen=True)
class StageFunctions:
    """The compiled functions of a stage.

    Attributes:
        train_step: Makes one update; the state is donated.
        gradient_norms: Takes the gradient norm of each loss term alone.
        old_logprobs: Fills in the trainer's log-probs; None for an objective that takes the
            sampler's.
    """

    train_step: TrainStep
    gradient_norms: Callable[[TrainState, Batch], Metrics]
    old_logprobs: Callable[[TrainState, Batch], Batch] | None


def make_stage_functions(
    stage: Stage,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float,
    runtime: Runtime,
    logits_mib: int,
    frozen_params: Params,
    reference_params: Params | None,
) -> StageFunctions:
    """Return the functions of a stage; nothing compiles before one is called.

    Args:
        stage: Objective, and the name of its optimizer.
        model_config: Architecture, with its adapters if any.
        optimizer: The optimizer of that name.
        temperature: Temperature that the rollouts were sampled at.
        runtime: Precision, rematerialisation and attention kernel.
        logits_mib: Memory for tiles of logits on each device.
        frozen_params: With LoRA, all parameters but the adapters; otherwise none.
        reference_params: Parameters of the reference policy, for an objective with a KL.
    """
    forward_options: Any = dict(temperature=temperature, runtime=runtime, logits_mib=logits_mib)
    loss_options: Any = forward_options | dict(
        frozen_params=frozen_params, reference_params=reference_params
    )
    old_logprobs = None
    if stage.objective.old_logprobs == "trainer":
        policy_logprobs = make_old_logprobs(model_config, **forward_options)

        def old_logprobs(state: TrainState, batch: Batch) -> Batch:
            return policy_logprobs(lora.whole(frozen_params, state.params), batch)

    return StageFunctions(
        train_step=make_train_step(
            model_config,
            stage.objective,
            optimizer,
            optimizer_name=stage.optimizer,
            **loss_options,
        ),
        gradient_norms=make_gradient_norms(model_config, stage.objective, **loss_options),
        old_logprobs=old_logprobs,
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


@functools.partial(jax.profiler.annotate_function, name="train")
def apply(
    functions: Mapping[Stage, StageFunctions],
    state: TrainState,
    updates: Sequence[Update],
    mesh: Mesh,
    *,
    measure_norms: bool,
) -> tuple[TrainState, list[Metrics]]:
    """Make the updates of one rollout in turn.

    Args:
        functions: Compiled functions of each stage.
        state: State before the first update; it is donated.
        updates: Stage and batch of each update.
        mesh: Devices.
        measure_norms: Take each term's gradient norm before every update.

    Returns:
        The state after the last update, and the metrics of each.
    """
    # The trainer's old log-probs are those before the first update, for all batches of the rollout.
    batches = []
    for update in updates:
        batch, old_logprobs = put(update.batch, mesh), functions[update.stage].old_logprobs
        if old_logprobs is not None and not batch.on_policy:  # else they are the step's own
            batch = old_logprobs(state, batch)
        batches.append(batch)

    metrics = []
    for update, batch in zip(updates, batches, strict=True):
        stage_functions = functions[update.stage]
        norms = stage_functions.gradient_norms(state, batch) if measure_norms else {}
        state, step_metrics = stage_functions.train_step(state, batch)
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
