"""Configurations that cannot run whatever model and data they name."""

import functools
from typing import Any

from srft_jax.config import RunConfig, UsageError


def _value(config: RunConfig, key: str) -> Any:
    """In: "training.optimizer.b1".  Out: config.training.optimizer.b1."""
    return functools.reduce(lambda section, name: vars(section)[name], key.split("."), config)


def _at_least(config: RunConfig, least: float, *keys: str) -> None:
    for key in keys:
        if not _value(config, key) >= least:  # NaN too
            raise UsageError(f"{key} = {_value(config, key)} is not at least {least}")


def check_config(config: RunConfig) -> None:
    """Raises UsageError on numbers out of range, and on numbers that cannot go together."""
    _check_numbers(config)
    _check_shapes(config)


def _check_numbers(config: RunConfig) -> None:
    _at_least(
        config,
        1,
        "data.prompts_per_step",
        "data.max_prompt_tokens",
        "rollout.completions_per_prompt",
        "rollout.max_new_tokens",
        "rollout.slots",
        "rollout.segment",
        "training.num_steps",
        "training.updates_per_rollout",
        "training.row_length",
        "training.rows_per_microbatch",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "evaluation.max_new_tokens",
        "evaluation.slots",
        "report.samples_every",
        "rewards.workers",
        "generate.completions",
        "generate.num_prompts",
    )
    _at_least(
        config,
        0,
        "seed",
        "evaluation.every",
        "report.samples_per_step",
        "training.optimizer.warmup_steps",
        "training.optimizer.learning_rate",
        "training.optimizer.final_fraction",
        "training.optimizer.weight_decay",
        "generate.temperature",
    )
    above_zero = ("rollout.temperature", "training.optimizer.clip_norm", "rewards.timeout_seconds")
    for key in above_zero:
        if not _value(config, key) > 0:
            raise UsageError(f"{key} = {_value(config, key)} is not above 0")
    for key in ("training.optimizer.b1", "training.optimizer.b2"):
        if not 0 <= _value(config, key) < 1:
            raise UsageError(f"{key} = {_value(config, key)} is not in [0, 1)")


def _check_shapes(config: RunConfig) -> None:
    """Group sizes, row lengths and splits that cannot work whatever the data."""
    rollout, training = config.rollout, config.training
    if config.objective.advantage_std and rollout.completions_per_prompt == 1:
        raise UsageError(
            "rollout.completions_per_prompt = 1 has no standard deviation; "
            "sample at least 2 or set objective.advantage_std to false"
        )
    if config.data.prompts_per_step % training.updates_per_rollout:
        raise UsageError(
            f"data.prompts_per_step = {config.data.prompts_per_step} does not split into "
            f"training.updates_per_rollout = {training.updates_per_rollout} equal parts"
        )
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens - 1
    if longest > training.row_length:
        raise UsageError(
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens} and "
            f"rollout.max_new_tokens = {rollout.max_new_tokens} make sequences of "
            f"up to {longest} tokens, which do not fit training.row_length = {training.row_length}"
        )
