"""The optimizers of a run, by Optax: clip, direction, decay, learning rate."""

import collections
import dataclasses
from collections.abc import Mapping

import optax

from srft_jax.config import ModelConfig, OptimizerConfig, TrainingConfig
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stages
from srft_jax.training.directions import direction
from srft_jax.training.moments import stored_as


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """The optimizers of a run by name: "policy", and "demonstration" where a stage has it.

    Attributes:
        transformations: Gradients to updates.
        learning_rates: Number of an update, from 0 -> its learning rate, for the log; the
            transformations scale by it already.
    """

    transformations: Mapping[str, optax.GradientTransformation]
    learning_rates: Mapping[str, optax.Schedule]


def make_optimizers(
    training: TrainingConfig, stages: Stages, model_config: ModelConfig
) -> Optimizers:
    """Return the optimizers of the run's stages; a cosine is as long as their updates.

    Args:
        training: Its sections `optimizer` and `demonstration_optimizer`.
        stages: Stages of the run.
        model_config: Architecture, with its adapters if any.
    """
    num_updates = collections.Counter[str]()
    for stage in stages.all:
        num_updates[stage.optimizer] += stage.num_updates
    sections = {"policy": training.optimizer, "demonstration": training.demonstration_optimizer}
    return Optimizers(
        transformations={
            name: make_optimizer(sections[name], model_config, number)
            for name, number in num_updates.items()
        },
        learning_rates={
            name: learning_rate(sections[name], number) for name, number in num_updates.items()
        },
    )


def learning_rate(optimizer_config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Return number of an update, from 0 -> learning rate: a linear warm-up, then constant, or a
    cosine that reaches its end at `num_updates`.

    The first update is at 1 / warmup_steps of the peak: at 0 it would waste its rollouts.
    In: warmup_steps 2, learning_rate .4, constant.  Out: .2, .4, .4, ...
    """
    steps, peak = max(1, optimizer_config.warmup_steps), optimizer_config.learning_rate
    warmup = optax.linear_schedule(peak / steps, peak, max(1, steps - 1))
    after = optax.constant_schedule(peak)
    if optimizer_config.schedule == "cosine":
        decay_steps = max(1, num_updates - optimizer_config.warmup_steps)
        after = optax.cosine_decay_schedule(
            peak, decay_steps, alpha=optimizer_config.final_fraction
        )
    return optax.join_schedules([warmup, after], [optimizer_config.warmup_steps])


def make_optimizer(
    optimizer_config: OptimizerConfig, model_config: ModelConfig, num_updates: int
) -> optax.GradientTransformation:
    """Return the transformation of gradients to updates: clip by global norm, then the direction
    that `optimizer_config.name` names, decoupled weight decay and the learning rate.

    Matrices decay, those of adapters too; norms and biases do not. The last part of its state is
    the schedule's.
    """

    def decays(params: Params) -> Params:
        """Whether each trained parameter decays."""
        is_matrix = {
            parameter.path: len(parameter.axes) >= 2
            for parameter in families.parameters(model_config)
        }
        return lora.trained(families.by_path(is_matrix), model_config)

    return optax.chain(
        optax.clip_by_global_norm(optimizer_config.clip_norm),
        stored_as(optimizer_config.state_dtype, direction(optimizer_config, model_config)),
        optax.add_decayed_weights(optimizer_config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(optimizer_config, num_updates)),
    )
