"""Train states of a run: fresh, abstract, or from its newest checkpoint."""

import jax
import optax

from srft_jax.batch import TrainState
from srft_jax.config import UsageError
from srft_jax.models.decoder import Params, init_params
from srft_jax.tasks.setup import Setup, load_params
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state, state_shardings


def optimizer_of(setup: Setup) -> optax.GradientTransformation:
    training = setup.config.training
    num_updates = training.num_steps * training.updates_per_rollout
    return make_optimizer(training.optimizer, setup.model_config, num_updates)


def _shardings(setup: Setup) -> TrainState:
    params = jax.eval_shape(lambda key: init_params(setup.model_config, key), jax.random.key(0))
    return state_shardings(setup.mesh, setup.model_config, optimizer_of(setup), params)


def fresh_state(setup: Setup) -> TrainState:
    """Step 0, from `model.path` or random, every leaf made on its shards."""
    optimizer = optimizer_of(setup)
    make = jax.jit(
        lambda params: new_state(params, optimizer),
        out_shardings=_shardings(setup),
        donate_argnums=0,
    )
    return make(load_params(setup))


def abstract_state(setup: Setup) -> TrainState:
    """Shapes and shardings of the state; nothing is allocated."""
    optimizer = optimizer_of(setup)
    shapes = jax.eval_shape(
        lambda key: new_state(init_params(setup.model_config, key), optimizer), jax.random.key(0)
    )
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        _shardings(setup),
    )


def trained_params(setup: Setup) -> Params:
    """Parameters of the newest checkpoint of the run directory.

    Raises:
        UsageError: the run directory has no checkpoint.
    """
    with Checkpoints(setup.config.run_dir, setup.config.training.keep_checkpoints) as checkpoints:
        step = checkpoints.newest()
        if step is None:
            raise UsageError(f"{setup.config.run_dir} has no checkpoint yet; train first")
        return checkpoints.restore(step, abstract_state(setup))[0].params
