"""The stages of a run: which objective and which optimizer an update is made with.

A run has one stage or more. In: objective.preset = sft_rl, objective.sft_steps = 100. Out: steps 1
to 100 are made with "sft", steps from 101 on with "policy".
"""

import dataclasses
from typing import Literal

from srft_jax.config import Objective, TrainingConfig, UsageError
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.rows import max_microbatches


@dataclasses.dataclass(frozen=True)
class Stage:
    """Updates by one objective and one optimizer.

    Attributes:
        name: "sft" is plain SFT before the first rollout, "policy" is the configured objective, and
            "buffered" is updates on buffered demonstrations between those of the policy's stage.
        objective: Coefficients of the loss.
        steps_before: Steps of the run before the stage begins.
        sequences_per_update: The most sequences that one update is made on.
        num_updates: Updates of the whole run; the most, as a prompt whose demonstration does not
            wait fills no buffer.
    """

    name: Literal["sft", "policy", "buffered"]
    objective: Objective
    steps_before: int
    sequences_per_update: int
    num_updates: int

    @property
    def optimizer(self) -> str:
        """Name of the stage's optimizer, a key of `TrainState.optimizer_states`."""
        return "policy" if self.name == "policy" else "demonstration"

    @property
    def label(self) -> str:
        """Prefix of the stage's metric names, where one step has updates of two stages."""
        return "buffered/" if self.name == "buffered" else ""

    def stage_step(self, step: int) -> int:
        """Return a step's number within the stage, from 0, by which the objective's schedules go.

        Args:
            step: Step of the run, from 1.
        """
        return step - 1 - self.steps_before

    def num_microbatches(self, longest_sequence: int, training: TrainingConfig) -> int:
        """Return M, the static number of microbatches, which any update of the stage fits into.

        Args:
            longest_sequence: Input tokens of the longest prompt and completion.
            training: Row length, and rows per microbatch, which must be a number by now.
        """
        return max_microbatches(self.sequences_per_update, longest_sequence, training)


@dataclasses.dataclass(frozen=True)
class Stages:
    """All stages of a run.

    Attributes:
        sft: Plain SFT in the first `objective.sft_steps` steps; None where that is 0.
        policy: The configured objective, from the first step or after `sft`.
        buffered: Updates on full buffers of demonstrations, after those of `policy` in the same
            step; None where `objective.demo_buffer` is 0.
    """

    sft: Stage | None
    policy: Stage
    buffered: Stage | None

    def at(self, step: int) -> Stage:
        """Return the stage that a step of the run, from 1, is in; never `buffered`."""
        if self.sft is not None and step <= self.policy.steps_before:
            return self.sft
        return self.policy

    def named(self, name: str) -> Stage:
        """Return the stage of this name.

        Raises:
            UsageError: the run does not have it.
        """
        for stage in self.all:
            if stage.name == name:
                return stage
        names = " and ".join(stage.name for stage in self.all)
        raise UsageError(
            f"the run has no stage {name}, only {names}; objective.sft_steps and "
            "objective.demo_buffer say which stages there are"
        )

    @property
    def all(self) -> list[Stage]:
        """The stages that the run has, `policy` always among them."""
        return [stage for stage in (self.sft, self.policy, self.buffered) if stage is not None]


def make_stages(
    objective: Objective,
    *,
    num_steps: int,
    prompts_per_step: int,
    updates_per_rollout: int,
    completions_per_prompt: int,
) -> Stages:
    """Return the stages of a run with this objective.

    Args:
        objective: Coefficients of the policy's stage, which also say which other stages there are.
        num_steps: Steps of the run.
        prompts_per_step: Prompts of one rollout.
        updates_per_rollout: Updates that a rollout's groups are split between.
        completions_per_prompt: G, for objectives that use rollouts.
    """
    prompts = prompts_per_step // updates_per_rollout
    sft_steps, rollout_steps = objective.sft_steps, num_steps - objective.sft_steps
    policy = Stage(
        name="policy",
        objective=objective,
        steps_before=sft_steps,
        sequences_per_update=_policy_sequences(
            objective, prompts, updates_per_rollout, completions_per_prompt
        ),
        num_updates=rollout_steps * updates_per_rollout,
    )
    sft = buffered = None
    if sft_steps:
        sft = Stage(
            name="sft",
            objective=PRESETS["sft"],
            steps_before=0,
            sequences_per_update=prompts,
            num_updates=sft_steps * updates_per_rollout,
        )
    if objective.demo_buffer:
        buffered = Stage(
            name="buffered",
            objective=_likelihood(objective),
            steps_before=sft_steps,
            sequences_per_update=objective.demo_buffer,
            num_updates=rollout_steps * prompts_per_step // objective.demo_buffer,
        )
    return Stages(sft=sft, policy=policy, buffered=buffered)


def _policy_sequences(
    objective: Objective, prompts: int, updates_per_rollout: int, completions_per_prompt: int
) -> int:
    """Most sequences per update of the policy stage, given its prompts."""
    completions = completions_per_prompt if objective.uses_rollouts else 0
    if objective.demo_source == "own":
        # Demonstrations of their own prompts, split between the updates.
        return prompts * completions + -(-objective.demo_per_step // updates_per_rollout)
    if objective.gate == "either":
        # A prompt brings its completions or its demonstration, never both.
        return prompts * max(completions, 1)
    # A prompt brings its completions and its demonstration, unless that waits in the buffer.
    in_groups = objective.trains_demonstrations and not objective.demo_buffer
    return prompts * (completions + in_groups)


def _likelihood(objective: Objective) -> Objective:
    """The objective's likelihood of demonstrations alone."""
    return dataclasses.replace(
        PRESETS["sft"],
        demo_nll=objective.demo_nll,
        demo_nll_entropy=objective.demo_nll_entropy,
        demo_nll_probability=objective.demo_nll_probability,
        entropy_scope=objective.entropy_scope,
        demo_aggregation=objective.demo_aggregation,
    )
