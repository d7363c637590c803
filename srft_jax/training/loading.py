"""Parameters of a run: drawn from its seed, read from a Hugging Face directory, or from one of its
checkpoints. Whatever their source, every array is made on its shards."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from srft_jax.config import ModelConfig, ModelSection, Objective, UsageError
from srft_jax.config.stored_config import check_same_adapters
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params, init_params
from srft_jax.models.hf_import import load_hf
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.state import abstract_params


def load_trained(model: ModelSection, model_config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Return the float32 parameters that training starts from.

    Without LoRA: the weights of `model.path`, or random ones. With LoRA: new adapters, A random,
    B = 0.

    Args:
        model: Where the model is.
        model_config: Architecture, with its adapters if any.
        mesh: Devices.
        seed: Seed of the run.
    """
    if model.path is not None and model.lora is None:
        return load_hf(model.path, mesh=mesh)[1]
    return _random_params(model_config, mesh, seed, lambda tree: lora.trained(tree, model_config))


def load_frozen(model: ModelSection, model_config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Return all parameters but the adapters, in `model.lora.base_dtype`: those of `model.path`, or
    random ones. Without LoRA there are none. Arguments as of `load_trained`."""
    if model.lora is None:
        return {}
    dtype = model.lora.base_dtype
    if model.path is not None:
        return load_hf(model.path, mesh=mesh, dtype=dtype)[1]
    base = _random_params(model_config, mesh, seed, lambda tree: lora.frozen(tree, model_config))
    return jax.tree.map(lambda x: x.astype(dtype), base)


def load_reference(
    model: ModelSection, objective: Objective, frozen_params: Params, mesh: Mesh
) -> Params | None:
    """Return the parameters of the reference policy; None for an objective without one.

    With LoRA and without `model.reference` they are the frozen parameters themselves, not a copy.
    """
    if not objective.uses_reference:
        return None
    if model.base_is_reference:
        return frozen_params
    path = model.reference or model.path
    assert path is not None  # checked before anything is loaded
    return load_hf(path, mesh=mesh)[1]


def load_policy(
    run_dir: str, model: ModelSection, model_config: ModelConfig, mesh: Mesh, seed: int
) -> Params:
    """Return all parameters of the policy at the newest checkpoint of a run, frozen ones too.

    Args:
        run_dir: Directory of the run.
        model: Where the model is that the run started from.
        model_config: Architecture, with its adapters if any.
        mesh: Devices.
        seed: Seed of the run.

    Raises:
        UsageError: as `load_checkpoint` raises it.
    """
    frozen = load_frozen(model, model_config, mesh, seed)
    return lora.whole(frozen, load_checkpoint(run_dir, model, model_config, mesh))


def load_checkpoint(
    run_dir: str,
    model: ModelSection,
    model_config: ModelConfig,
    mesh: Mesh,
    step: int | None = None,
) -> Params:
    """Return the trained parameters at a step's checkpoint, by default the newest one.

    Args:
        run_dir: Directory of the run.
        model: The run's `model`, whose adapters must be those that the run was made with.
        model_config: Architecture, with its adapters if any.
        mesh: Devices, which need not be the run's.
        step: Step of the checkpoint.

    Raises:
        UsageError: the run directory has no such checkpoint, or one of other parameters.
    """
    check_same_adapters(run_dir, model.lora)
    like = lora.trained(abstract_params(model_config, mesh), model_config)
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UsageError(f"{run_dir} has no checkpoint yet; train first")
        if step is not None and step not in steps:
            raise UsageError(
                f"{run_dir} has no checkpoint of step {step}; it has those of "
                f"{', '.join(map(str, steps))}"
            )
        return checkpoints.restore_params(steps[-1] if step is None else step, like)


def _random_params(
    model_config: ModelConfig, mesh: Mesh, seed: int, part: Callable[[Params], Params]
) -> Params:
    """Draw `part` of the parameters from the seed; the rest is never allocated."""
    init = jax.jit(
        lambda key: part(init_params(model_config, key)),
        out_shardings=part(families.param_shardings(mesh, model_config)),
    )
    return init(jax.random.fold_in(jax.random.key(seed), 0))
