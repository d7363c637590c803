"""Which objective and which optimizer an update is made with."""

import dataclasses
from typing import Literal

from srft_jax.config import RunConfig
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates by one objective and one optimizer.

    Attributes:
        name: What it is: plain SFT before the first rollout, the configured objective, or updates
            on buffered demonstrations between those of the objective.
        objective: Coefficients of the loss.
        steps_before: Steps of the run before the stage.
        sequences_per_update: At most.
    """

    name: Literal["sft", "policy", "buffered"]
    objective: Objective
    steps_before: int
    sequences_per_update: int

    @property
    def optimizer(self) -> str:
        """Its key in `TrainState.optimizer_states`."""
        return "policy" if self.name == "policy" else "demonstration"

    @property
    def label(self) -> str:
        """Put before the names of its metrics, where a step has others of the same names."""
        return "buffered/" if self.name == "buffered" else ""

    def number(self, step: int) -> int:
        """Of a step of the run within the stage, from 0, as the objective's schedules count."""
        return step - 1 - self.steps_before


def policy_stage(config: RunConfig, objective: Objective) -> Stage:
    """The configured objective, from the first step or after the first stage."""
    updates = config.training.updates_per_rollout
    prompts = config.data.prompts_per_step // updates
    own = config.rollout.completions_per_prompt if objective.uses_rollouts else 0
    if objective.demo_source == "own":
        sequences = prompts * own + -(-objective.demo_per_step // updates)
    elif objective.gate == "either":  # completions or the demonstration
        sequences = prompts * max(own, 1)
    else:
        with_groups = objective.trains_demonstrations and not objective.demo_buffer
        sequences = prompts * (own + with_groups)
    return Stage("policy", objective, objective.sft_steps, sequences)


def sft_stage(config: RunConfig) -> Stage:
    """What precedes the policy's stage where `objective.sft_steps` is above 0."""
    prompts = config.data.prompts_per_step // config.training.updates_per_rollout
    return Stage("sft", PRESETS["sft"], 0, prompts)


def buffered_stage(objective: Objective) -> Stage:
    """Updates on buffered demonstrations, between those of the policy's stage."""
    likelihood = dataclasses.replace(
        PRESETS["sft"],
        demo_nll=objective.demo_nll,
        demo_nll_entropy=objective.demo_nll_entropy,
        demo_nll_probability=objective.demo_nll_probability,
        entropy_scope=objective.entropy_scope,
        demo_aggregation=objective.demo_aggregation,
    )
    return Stage("buffered", likelihood, objective.sft_steps, objective.demo_buffer)
