"""Parameters and train states of a run: fresh, abstract, or from its newest checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import TrainState
from srft_jax.config import ModelConfig, OptimizerConfig, RunConfig, UsageError
from srft_jax.config.stored_config import check_same_adapters
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params, init_params
from srft_jax.models.hf_import import load_hf
from srft_jax.setup.outline import Outline
from srft_jax.setup.prepare import Setup
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.optimizer import learning_rate, make_optimizer
from srft_jax.training.state import new_state, param_shardings, state_shardings


def _optimizer_configs(setup: Outline) -> dict[str, tuple[OptimizerConfig, int]]:
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


def learning_rate_of(setup: Outline, optimizer: str) -> optax.Schedule:
    """Of the optimizer of that name, by its own updates."""
    return learning_rate(*_optimizer_configs(setup)[optimizer])


def optimizers_of(setup: Outline) -> dict[str, optax.GradientTransformation]:
    """By name: "policy", and "demonstration" where steps are on demonstrations alone."""
    return {
        name: make_optimizer(config, setup.model_config, num_updates)
        for name, (config, num_updates) in _optimizer_configs(setup).items()
    }


def _random_params(
    config: RunConfig, model_config: ModelConfig, mesh: Mesh, part: Callable[[Params], Params]
) -> Params:
    """A part of the parameters that the run's seed makes; nothing else is allocated."""
    init = jax.jit(
        lambda key: part(init_params(model_config, key)),
        out_shardings=part(param_shardings(mesh, model_config)),
    )
    return init(jax.random.fold_in(jax.random.key(config.seed), 0))


def _load_trained(setup: Setup) -> Params:
    """Initial float32 parameters that training changes: from `model.path`, or random. Adapters are
    random, and their product is 0."""
    model, architecture = setup.config.model, setup.model_config
    if model.path is not None and model.lora is None:
        return load_hf(model.path, mesh=setup.mesh)[1]
    return _random_params(
        setup.config, architecture, setup.mesh, lambda tree: lora.trained(tree, architecture)
    )


def load_frozen(config: RunConfig, model_config: ModelConfig, mesh: Mesh) -> Params:
    """With LoRA, all parameters but the adapters: from `model.path`, or random; otherwise none."""
    model = config.model
    if model.lora is None:
        return {}
    dtype = model.lora.base_dtype
    if model.path is not None:
        return load_hf(model.path, mesh=mesh, dtype=dtype)[1]

    base = _random_params(config, model_config, mesh, lambda tree: lora.frozen(tree, model_config))
    return jax.tree.map(lambda x: x.astype(dtype), base)


def load_reference(setup: Setup, frozen_params: Params) -> Params | None:
    """Parameters of the reference policy; None for an objective without one.

    With LoRA and without `model.reference` they are the frozen ones, of which there is no copy.
    """
    if not setup.objective.uses_reference:
        return None
    if setup.base_is_reference:
        return frozen_params
    assert setup.reference_path is not None  # `prepare` has checked it
    return load_hf(setup.reference_path, mesh=setup.mesh)[1]


def _init_trained(model_config: ModelConfig) -> Params:
    return lora.trained(init_params(model_config, jax.random.key(0)), model_config)


def _shardings(setup: Outline) -> TrainState:
    params = jax.eval_shape(lambda: _init_trained(setup.model_config))
    return state_shardings(setup.mesh, setup.model_config, optimizers_of(setup), params)


def fresh_state(setup: Setup) -> TrainState:
    """Step 0, from `model.path` or random, every leaf made on its shards."""
    optimizers = optimizers_of(setup)
    make = jax.jit(
        lambda params: new_state(params, optimizers),
        out_shardings=_shardings(setup),
        donate_argnums=0,
    )
    return make(_load_trained(setup))


def abstract_state(setup: Outline) -> TrainState:
    """Shapes and shardings of the state; nothing is allocated."""
    optimizers = optimizers_of(setup)
    shapes = jax.eval_shape(lambda: new_state(_init_trained(setup.model_config), optimizers))
    return with_shardings(shapes, _shardings(setup))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays on these shards."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def policy_params(setup: Setup) -> Params:
    """Parameters of the policy at the newest checkpoint of the run directory, frozen ones too.

    Raises:
        UsageError: the run directory has no checkpoint.
    """
    of_run = setup.config, setup.model_config, setup.mesh
    return lora.whole(load_frozen(*of_run), restored_params(*of_run))


def restored_params(
    config: RunConfig, model_config: ModelConfig, mesh: Mesh, step: int | None = None
) -> Params:
    """What training has changed, as of a step's checkpoint, by default the newest.

    Raises:
        UsageError: the run directory has no such checkpoint, or one of other parameters.
    """
    check_same_adapters(config)
    # From the table: to trace `init_params` before there is a checkpoint would take a second.
    shapes = {
        row.path: jax.ShapeDtypeStruct(families.stacked_shape(row, model_config), "float32")
        for row in families.parameters(model_config)
    }
    like = with_shardings(families.by_path(shapes), param_shardings(mesh, model_config))
    like = lora.trained(like, model_config)
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
