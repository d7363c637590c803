"""Parameters and train states of a run: fresh, abstract, or from its newest checkpoint."""

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import TrainState
from srft_jax.config import ModelConfig, OptimizerConfig, RunConfig, UsageError
from srft_jax.models import families
from srft_jax.models.checkpoint_hf import load_hf
from srft_jax.models.decoder import Params, init_params
from srft_jax.tasks.setup import Setup
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.optimizer import learning_rate, make_optimizer
from srft_jax.training.state import new_state, param_shardings, state_shardings


def _optimizer_configs(setup: Setup) -> dict[str, tuple[OptimizerConfig, int]]:
    """Of each optimizer of the run, and how many updates it makes at most, for its schedule."""
    config, objective = setup.config, setup.objective
    training, per_step = config.training, config.training.updates_per_rollout
    rollout_steps = training.num_steps - objective.sft_steps
    configs = {"policy": (training.optimizer, rollout_steps * per_step)}
    if objective.sft_steps or objective.demo_buffer:
        seen = rollout_steps * config.data.prompts_per_step
        buffered = seen // objective.demo_buffer if objective.demo_buffer else 0
        num_updates = objective.sft_steps * per_step + buffered
        configs["demonstration"] = (training.demonstration_optimizer, num_updates)
    return configs


def learning_rate_of(setup: Setup, optimizer: str) -> optax.Schedule:
    """Of the optimizer of that name, by its own updates."""
    return learning_rate(*_optimizer_configs(setup)[optimizer])


def optimizers_of(setup: Setup) -> dict[str, optax.GradientTransformation]:
    """By name: "policy", and "demonstration" where steps are on demonstrations alone."""
    return {
        name: make_optimizer(config, setup.model_config, num_updates)
        for name, (config, num_updates) in _optimizer_configs(setup).items()
    }


def load_params(setup: Setup) -> Params:
    """Initial float32 parameters, on their shards: from `model.path`, or random from the seed."""
    if setup.config.model.path is not None:
        return load_hf(setup.config.model.path, mesh=setup.mesh)[1]
    shardings = param_shardings(setup.mesh, setup.model_config)
    init = jax.jit(lambda key: init_params(setup.model_config, key), out_shardings=shardings)
    return init(jax.random.fold_in(jax.random.key(setup.config.seed), 0))


def load_reference(setup: Setup) -> Params | None:
    """Parameters of the reference policy, on their shards; None for an objective without one."""
    if not setup.objective.uses_reference:
        return None
    assert setup.reference_path is not None  # `prepare` has checked it
    return load_hf(setup.reference_path, mesh=setup.mesh)[1]


def _shardings(setup: Setup) -> TrainState:
    params = jax.eval_shape(lambda key: init_params(setup.model_config, key), jax.random.key(0))
    return state_shardings(setup.mesh, setup.model_config, optimizers_of(setup), params)


def fresh_state(setup: Setup) -> TrainState:
    """Step 0, from `model.path` or random, every leaf made on its shards."""
    optimizers = optimizers_of(setup)
    make = jax.jit(
        lambda params: new_state(params, optimizers),
        out_shardings=_shardings(setup),
        donate_argnums=0,
    )
    return make(load_params(setup))


def abstract_state(setup: Setup) -> TrainState:
    """Shapes and shardings of the state; nothing is allocated."""
    optimizers = optimizers_of(setup)
    shapes = jax.eval_shape(
        lambda key: new_state(init_params(setup.model_config, key), optimizers), jax.random.key(0)
    )
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        _shardings(setup),
    )


def abstract_params(mesh: Mesh, model_config: ModelConfig) -> Params:
    """Shapes and shardings of the parameters, by the table; nothing is traced or allocated."""
    where = param_shardings(mesh, model_config)
    rows = families.parameters(model_config)
    shapes = families.by_path({row.path: families.stacked_shape(row, model_config) for row in rows})
    return jax.tree.map(
        lambda one, shape: jax.ShapeDtypeStruct(shape, "float32", sharding=one), where, shapes
    )


def trained_params(setup: Setup) -> Params:
    """Parameters of the newest checkpoint of the run directory.

    Raises:
        UsageError: the run directory has no checkpoint.
    """
    return restored_params(setup.config, abstract_params(setup.mesh, setup.model_config))


def restored_params(config: RunConfig, like: Params, step: int | None = None) -> Params:
    """Parameters of a step's checkpoint, by default the newest, shaped and placed as `like`.

    Raises:
        UsageError: the run directory has no such checkpoint.
    """
    with Checkpoints(config.run_dir, config.training.keep_checkpoints) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UsageError(f"{config.run_dir} has no checkpoint yet; train first")
        if step is not None and step not in steps:
            raise UsageError(
                f"{config.run_dir} has no checkpoint of step {step}; it has those of "
                f"{', '.join(map(str, steps))}"
            )
        return checkpoints.restore_params(steps[-1] if step is None else step, like)
