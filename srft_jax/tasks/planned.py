"""A run as its train step is compiled and as planning takes it, for every verb that asks."""

import dataclasses
from collections.abc import Callable

from srft_jax.config.stored_config import stored_config
from srft_jax.mesh import gathered
from srft_jax.models.decoder import Params
from srft_jax.objectives.schedules import longest_prefix
from srft_jax.planning.microbatch_size import free_mib, most_rows, step_mib
from srft_jax.planning.planned_run import Lengths, PlannedRun
from srft_jax.report import summary
from srft_jax.setup.model_checks import check_sizes
from srft_jax.setup.outline import Outline
from srft_jax.setup.plan_checks import longest_trained_answer
from srft_jax.setup.prepare import Setup
from srft_jax.training.microbatch import ForwardOptions


def forward_options(run: Outline) -> ForwardOptions:
    """Return what all programs of the trainer are compiled with."""
    return ForwardOptions(
        model_config=run.model_config,
        runtime=run.runtime,
        temperature=run.config.rollout.temperature,
        logits_mib=run.config.training.logits_mib,
    )


def step_arithmetic(setup: Setup, frozen: Params, trained: Params) -> str:
    """Return the table of what a step is made of.

    Args:
        setup: The run.
        frozen: With LoRA, all parameters but the adapters, or their shapes; otherwise none.
        trained: Parameters that training changes, or their shapes.
    """
    config, stages = setup.config, setup.stages
    return summary.batch_arithmetic(
        summary.data_rows(setup.data),
        summary.policy_rows(frozen, trained, setup.tokenizer),
        [["objective", config.objective.preset]],
        summary.rollout_rows(
            stages.policy.objective,
            prompts_per_step=config.data.prompts_per_step,
            completions_per_prompt=config.rollout.completions_per_prompt,
        ),
        summary.update_rows(stages, config.training, config.longest_sequence),
        summary.device_rows(setup.mesh),
    )


def planned(run: Outline) -> PlannedRun:
    """Return what planning takes of a run."""
    config = run.config
    mean_prompt, mean_completion = config.plan.mean_prompt, config.plan.mean_completion
    longest = longest_trained_answer(config, run.objective)
    return PlannedRun(
        preset=config.objective.preset,
        objective=run.objective,
        forward=forward_options(run),
        mesh=run.mesh,
        training=config.training,
        sampling=run.sampling,
        prompts_per_step=config.data.prompts_per_step,
        completions_per_prompt=config.rollout.completions_per_prompt,
        lengths=Lengths(
            longest_prompt=config.data.max_prompt_tokens,
            longest_prefix=longest_prefix(run.objective, config.longest_demonstration),
            longest_sequence=config.longest_sequence,
            mean_prompt=config.data.max_prompt_tokens if mean_prompt is None else mean_prompt,
            mean_completion=longest if mean_completion is None else mean_completion,
        ),
        base_is_reference=config.model.base_is_reference,
    )


def with_rows(
    setup: Setup, needed_mib: Callable[[PlannedRun], float] = step_mib
) -> tuple[Setup, str]:
    """Return the setup with a number of rows per microbatch, and a line that says how it was found.

    The line is empty if the number was given. A run that goes on keeps the number that it was
    started with.

    Args:
        setup: Setup, whose training.rows_per_microbatch may be auto.
        needed_mib: Memory of the train step, to choose the number by.

    Raises:
        UsageError: not even the fewest rows fit, the memory is not known, or the rows of a run that
            goes on do not split over the mesh.
    """
    config = setup.config
    if config.training.rows_per_microbatch != "auto":
        return setup, ""
    stored = gathered(stored_config(config.run_dir))[0]  # all processes take one branch
    if stored is not None:
        rows, line = stored.training.rows, ""
    else:
        memory = config.training.memory_mib
        budget = free_mib() if memory is None else memory
        rows, line = most_rows(planned(setup), budget, needed_mib)
    training = dataclasses.replace(config.training, rows_per_microbatch=rows)
    chosen = dataclasses.replace(setup, config=dataclasses.replace(config, training=training))
    # The mesh may be another one than the stored run's.
    check_sizes(chosen.config, chosen.model_config, chosen.mesh)
    return chosen, line
