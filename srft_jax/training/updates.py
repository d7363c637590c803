"""Optimizer steps on the mesh: the compiled functions of each stage, and their application."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from srft_jax.batch import Batch, Metrics, TrainState
from srft_jax.experience.batches import Update
from srft_jax.mesh import placed, sharding
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stage
from srft_jax.setup.outline import Outline
from srft_jax.training.initial import learning_rate_of, optimizers_of
from srft_jax.training.logprobs import make_old_logprobs
from srft_jax.training.metrics import present
from srft_jax.training.state import updates_made
from srft_jax.training.step import TrainStep, make_gradient_norms, make_train_step


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of a stage.

    Attributes:
        train_step: One update; the state is donated.
        gradient_norms: Of each loss term apart.
        old_logprobs: Fills in the trainer's; None for an objective that takes the sampler's.
    """

    train_step: TrainStep
    gradient_norms: Callable[[TrainState, Batch], Metrics]
    old_logprobs: Callable[[TrainState, Batch], Batch] | None


def make_programs(
    setup: Outline, stage: Stage, frozen_params: Params, reference_params: Params | None
) -> Programs:
    """Nothing compiles before it is called.

    Args:
        setup: Of the run.
        stage: Objective and optimizer.
        frozen_params: With LoRA, all but the adapters.
        reference_params: For an objective with a KL.
    """
    training, objective = setup.config.training, stage.objective
    of_pass = dict[str, Any](
        temperature=setup.config.rollout.temperature,
        runtime=setup.runtime,
        logits_mib=training.logits_mib,
    )
    of_loss = of_pass | dict(frozen_params=frozen_params, reference_params=reference_params)
    old_logprobs = None
    if objective.old_logprobs == "trainer":
        of_policy = make_old_logprobs(setup.model_config, **of_pass)

        def old_logprobs(state: TrainState, batch: Batch) -> Batch:
            return of_policy(lora.whole(frozen_params, state.params), batch)

    return Programs(
        make_train_step(
            setup.model_config,
            objective,
            optimizers_of(setup)[stage.optimizer],
            optimizer_name=stage.optimizer,
            **of_loss,
        ),
        make_gradient_norms(setup.model_config, objective, **of_loss),
        old_logprobs,
    )


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Rows split over the data-parallel devices, counts on all of them; all processes have all of
    the batch."""
    return placed(batch, batch_shardings(batch, mesh))


def batch_shardings(batch: Batch, mesh: Mesh) -> Any:
    """Of each array of a batch, which may be abstract."""
    axes = {3: (None, "batch", None), 0: ()}
    return jax.tree.map(lambda x: sharding(mesh, axes[x.ndim], x.shape), batch)


@functools.partial(jax.profiler.annotate_function, name="train")
def apply(
    programs: Mapping[Stage, Programs],
    state: TrainState,
    updates: Sequence[Update],
    mesh: Mesh,
    *,
    measure_norms: bool,
) -> tuple[TrainState, list[Metrics]]:
    """Makes the updates of one rollout in turn.

    Args:
        programs: By stage.
        state: Before the first update, hence of the policy that sampled.
        updates: Stage and batch of each.
        mesh: Devices.
        measure_norms: Take each term's gradient norm before every update.

    Returns:
        The state after the last update, and the metrics of each.
    """
    batches = []
    for update in updates:
        batch, old_logprobs = put(update.batch, mesh), programs[update.stage].old_logprobs
        if old_logprobs is not None and not batch.on_policy:  # else they are the step's own
            batch = old_logprobs(state, batch)
        batches.append(batch)
    metrics = []
    for update, batch in zip(updates, batches, strict=True):
        stage_programs = programs[update.stage]
        norms = stage_programs.gradient_norms(state, batch) if measure_norms else {}
        state, of_update = stage_programs.train_step(state, batch)
        values = present(of_update, update.batch.normalisers, update.stage.objective) | norms
        metrics.append({update.stage.label + name: value for name, value in values.items()})
    return state, metrics


def describe(setup: Outline, state: TrainState, updates: Sequence[Update]) -> dict[str, float]:
    """How many updates there are, and the rate of each stage's first; `state` precedes them."""
    values = {"optimizer/updates": float(len(updates))}
    for stage in dict.fromkeys(update.stage for update in updates):
        schedule = learning_rate_of(setup, stage.optimizer)
        rate = float(schedule(updates_made(state, stage.optimizer)))
        values[f"{stage.label}optimizer/learning_rate"] = rate
    return values
