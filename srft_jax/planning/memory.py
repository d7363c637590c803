"""Bytes on a device by purpose, in the two phases that hold the most: updates, and rollouts."""

import dataclasses
from collections.abc import Mapping

from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.planning.program_costs import ProgramCost, bytes_on_device
from srft_jax.planning.train_program import abstract_batch, fixed_params, train_state
from srft_jax.setup.outline import Outline
from srft_jax.training.loading import abstract_params

ByPurpose = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Held:
    """What is there before any program runs, from the shards of each array."""

    parameters: float  # all that the run holds: trained, frozen, and a reference of their own
    optimizer: float
    gradients: float  # float32, of what is trained; in the train step only


def held(run: Outline) -> Held:
    """Padding to XLA's tiles aside."""
    state = train_state(run)
    frozen, reference = fixed_params(run)
    fixed = bytes_on_device(frozen) + (0 if reference is frozen else bytes_on_device(reference))
    trained = lora.trained(abstract_params(run.model_config, run.mesh), run.model_config)
    return Held(
        parameters=bytes_on_device(state.params) + fixed,
        optimizer=bytes_on_device(state.optimizer_states),
        gradients=bytes_on_device(trained),
    )


def batch_bytes(run: Outline) -> float:
    """Of an update."""
    stage = run.stages.policy
    return bytes_on_device(abstract_batch(run, stage))


def of_updates(of_run: Held, batch: float, train: ProgramCost) -> ByPurpose:
    """XLA's total of the train step; what its arguments and gradients leave is activations."""
    named = of_run.parameters + of_run.optimizer + batch
    return {
        "parameters": of_run.parameters,
        "optimizer": of_run.optimizer,
        "batch": batch,
        "gradients": min(of_run.gradients, train.temp),
        "activations and temporaries": max(0.0, train.temp - of_run.gradients) + train.added,
        "padding and code": max(0.0, train.arguments - named) + train.code,
    }


def of_rollouts(
    of_run: Held, sampler_params: float, cache: float, programs: Mapping[str, ProgramCost]
) -> ByPurpose:
    """The sampler's copy of the parameters and its cache, beside the train state; no batch yet."""
    temp = max((one.temp + one.code for one in programs.values()), default=0.0)
    return {
        "parameters": of_run.parameters,
        "optimizer": of_run.optimizer,
        "sampler's parameters": sampler_params,
        "KV cache": cache,
        "activations and temporaries": temp,
    }


def policy_params(run: Outline) -> Params:
    """Abstract, as the sampler is given them: what is frozen in its own dtype."""
    frozen, _ = fixed_params(run)
    return lora.whole(frozen, train_state(run).params)
