"""AdamW by Optax, from its config section."""

import optax

from srft_jax.config import ModelConfig, OptimizerConfig
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params


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
    """Clip by global norm, then AdamW; matrices decay, those of adapters too, norms and biases do
    not."""

    def decays(params: Params) -> Params:
        rows = families.parameters(model_config)
        of_all = families.by_path({row.path: len(row.axes) >= 2 for row in rows})
        return lora.trained(of_all, model_config)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_updates),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
