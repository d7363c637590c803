"""The optimizer of a config section, by Optax: clip, direction, decay, learning rate."""

import optax

from srft_jax.config import ModelConfig, OptimizerConfig
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params
from srft_jax.training.directions import direction
from srft_jax.training.moments import stored_as


def learning_rate(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a cosine that reaches its end at `num_updates`.

    The first update is at 1 / warmup_steps of the peak: at 0 it would waste its rollouts.
    """
    steps, peak = max(1, config.warmup_steps), config.learning_rate
    warmup = optax.linear_schedule(peak / steps, peak, max(1, steps - 1))
    after = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        decay_steps = max(1, num_updates - config.warmup_steps)
        after = optax.cosine_decay_schedule(
            config.learning_rate, decay_steps, alpha=config.final_fraction
        )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, model_config: ModelConfig, num_updates: int
) -> optax.GradientTransformation:
    """Clip by global norm, then the direction that `config.name` says, decoupled decay and the
    learning rate; matrices decay, those of adapters too, norms and biases do not.

    The state's last part is the schedule's.
    """

    def decays(params: Params) -> Params:
        rows = families.parameters(model_config)
        of_all = families.by_path({row.path: len(row.axes) >= 2 for row in rows})
        return lora.trained(of_all, model_config)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        stored_as(config.state_dtype, direction(config, model_config)),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(config, num_updates)),
    )
