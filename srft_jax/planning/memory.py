"""Bytes on a device by purpose, in the two phases that hold the most: updates, and rollouts."""

import dataclasses
from collections.abc import Iterable

from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.planning.planned_run import PlannedRun
from srft_jax.planning.program_costs import ProgramCost, bytes_on_device
from srft_jax.planning.train_program import abstract_batch, fixed_params, train_state

ByPurpose = dict[str, float]


@dataclasses.dataclass(frozen=True)
class ResidentBytes:
    """Bytes of a run's own arrays on each device, without XLA's tile padding.

    Attributes:
        trained: Parameters that updates change, in float32.
        frozen: With adapters, all other parameters, in `model.lora.base_dtype`.
        reference: float32 parameters of a reference policy, unless that is the frozen ones.
        optimizer: Moments and counters.
    """

    trained: float
    frozen: float
    reference: float
    optimizer: float

    @property
    def parameters(self) -> float:
        """Bytes of all parameters."""
        return self.trained + self.frozen + self.reference

    @property
    def gradients(self) -> float:
        """Bytes of float32 gradients of what is trained, which exist in the train step only."""
        return self.trained


def resident_bytes(run: PlannedRun) -> ResidentBytes:
    """Return what a device holds of the run's state, from the shards of each array."""
    state = train_state(run)
    frozen, reference = fixed_params(run)
    return ResidentBytes(
        trained=bytes_on_device(state.params),
        frozen=bytes_on_device(frozen),
        reference=0.0 if reference is frozen else bytes_on_device(reference),
        optimizer=bytes_on_device(state.optimizer_states),
    )


def batch_bytes(run: PlannedRun) -> float:
    """Return the bytes of one update's batch on a device."""
    return bytes_on_device(abstract_batch(run))


def memory_in_updates(resident: ResidentBytes, batch: float, train: ProgramCost) -> ByPurpose:
    """Return XLA's total for the train step by purpose; what is not named is activations."""
    named = resident.parameters + resident.optimizer + batch
    return {
        "parameters": resident.parameters,
        "optimizer": resident.optimizer,
        "batch": batch,
        "gradients": min(resident.gradients, train.temp),
        "activations and temporaries": max(0.0, train.temp - resident.gradients) + train.added,
        "padding and code": max(0.0, train.arguments - named) + train.code,
    }


def memory_in_rollouts(
    resident: ResidentBytes,
    sampler_params: float,
    cache: float,
    programs: Iterable[ProgramCost],
) -> ByPurpose:
    """Return the bytes while sampling, when the train state stays but has no batch yet.

    Args:
        resident: Train state.
        sampler_params: Bytes of the sampler's copy of the parameters.
        cache: Bytes of the KV cache.
        programs: The sampler's programs, of which one runs at a time.
    """
    temp = max((program.temp + program.code for program in programs), default=0.0)
    return {
        "parameters": resident.parameters,
        "optimizer": resident.optimizer,
        "sampler's parameters": sampler_params,
        "KV cache": cache,
        "activations and temporaries": temp,
    }


def policy_params(run: PlannedRun) -> Params:
    """Return the abstract parameters that the sampler is given, frozen ones in their own dtype."""
    return lora.whole(fixed_params(run).frozen, train_state(run).params)
