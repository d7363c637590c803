"""The train state: its leaves, where each lies on the mesh, and how a fresh one is made there."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srft_jax.batch import TrainState
from srft_jax.config import ModelConfig
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params
from srft_jax.training.moments import moment_shardings

# Name of an optimizer, see `TrainState.optimizer_states` -> the optimizer.
Transformations = Mapping[str, optax.GradientTransformation]


def new_state(params: Params, transformations: Transformations) -> TrainState:
    """Return the state at step 0 with these trained parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_states={
            name: optimizer.init(params) for name, optimizer in transformations.items()
        },
        entropy_self=jnp.zeros((), jnp.float32),
        entropy_demonstration=jnp.zeros((), jnp.float32),
    )


def abstract_params(model_config: ModelConfig, mesh: Mesh, dtype: str = "float32") -> Params:
    """Return the shapes and shardings of all parameters, as the trainer lays them out."""
    # Read from the table: to trace `init_params` would take a second.
    shapes = {
        parameter.path: jax.ShapeDtypeStruct(families.stacked_shape(parameter, model_config), dtype)
        for parameter in families.parameters(model_config)
    }
    return with_shardings(families.by_path(shapes), families.param_shardings(mesh, model_config))


def state_shardings(
    model_config: ModelConfig, transformations: Transformations, mesh: Mesh
) -> TrainState:
    """Return the sharding of each leaf: moments lie as their parameter lies, all other optimizer
    state and the scalars are on every device.

    Args:
        model_config: Architecture, with its adapters if any.
        transformations: Optimizers by name.
        mesh: Devices.
    """
    return jax.tree.map(lambda x: x.sharding, abstract_state(model_config, transformations, mesh))


def abstract_state(
    model_config: ModelConfig, transformations: Transformations, mesh: Mesh
) -> TrainState:
    """Return the state's shapes and shardings; nothing is allocated. Arguments as of
    `state_shardings`."""
    params = lora.trained(abstract_params(model_config, mesh), model_config)
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda tree: new_state(tree, transformations), params)
    shardings = TrainState(
        step=everywhere,
        params=lora.trained(families.param_shardings(mesh, model_config), model_config),
        optimizer_states={
            name: moment_shardings(model_config, mesh, state)
            for name, state in shapes.optimizer_states.items()
        },
        entropy_self=everywhere,
        entropy_demonstration=everywhere,
    )
    return with_shardings(shapes, shardings)


def fresh_state(
    params: Params, model_config: ModelConfig, transformations: Transformations, mesh: Mesh
) -> TrainState:
    """Return the state at step 0, every leaf made on its shards; the parameters are donated.

    Args:
        params: Trained parameters, laid out on the mesh.
        model_config: Architecture, with its adapters if any.
        transformations: Optimizers by name.
        mesh: Devices.
    """
    make = jax.jit(
        lambda tree: new_state(tree, transformations),
        out_shardings=state_shardings(model_config, transformations, mesh),
        donate_argnums=0,
    )
    return make(params)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Return the abstract arrays of a tree, laid out by a tree of shardings."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def updates_made(state: TrainState, optimizer: str) -> int:
    """Return how many updates the optimizer of this name has made, by which its learning-rate
    schedule goes."""
    return int(state.optimizer_states[optimizer][-1].count)
