"""The train state: made under jit, straight onto its shards."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srft_jax.batch import TrainState
from srft_jax.config import ModelConfig
from srft_jax.models.decoder import Params
from srft_jax.models.families import param_shardings
from srft_jax.models.lora import trained
from srft_jax.training.moments import moment_shardings

Optimizers = Mapping[str, optax.GradientTransformation]  # by name, see TrainState


def new_state(params: Params, optimizers: Optimizers) -> TrainState:
    """Step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_states={name: one.init(params) for name, one in optimizers.items()},
        entropy_self=jnp.zeros((), jnp.float32),
        entropy_demonstration=jnp.zeros((), jnp.float32),
    )


def state_shardings(
    mesh: Mesh, config: ModelConfig, optimizers: Optimizers, params: Params
) -> TrainState:
    """Of each leaf: moments lie as their parameter lies, all else is on every device."""
    of_params = trained(param_shardings(mesh, config), config)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda p: new_state(p, optimizers), params)
    of_moments = {
        name: moment_shardings(mesh, config, state)
        for name, state in shapes.optimizer_states.items()
    }
    return TrainState(everywhere, of_params, of_moments, everywhere, everywhere)


def updates_made(state: TrainState, optimizer: str) -> int:
    """How often the optimizer of that name has stepped: where its learning-rate schedule stands."""
    return int(state.optimizer_states[optimizer][-1].count)
