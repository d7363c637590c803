"""Checks of the configuration alone, without model and data: ranges, and keys that go together."""

import functools
import math
from typing import Any

from srft_jax.config import OptimizerConfig, RunConfig, UsageError
from srft_jax.rewards.verifiers import check_options


def _value(config: RunConfig, key: str) -> Any:
    """In: "training.optimizer.b1".  Out: config.training.optimizer.b1."""
    return functools.reduce(lambda section, name: vars(section)[name], key.split("."), config)


def _at_least(config: RunConfig, least: float, *keys: str) -> None:
    for key in keys:
        if not _value(config, key) >= least:  # NaN too
            raise UsageError(f"{key} = {_value(config, key)} is not at least {least}")


def check_config(config: RunConfig) -> None:
    """Raises UsageError on numbers out of range, and on numbers that cannot go together.

    Args:
        config: As asked for, the objective's preset expanded.
    """
    _check_numbers(config)
    for key in ("rollout.cache_mib", "data.max_demonstration_tokens"):
        if _value(config, key) is not None:
            _at_least(config, 1, key)
    if "" in config.rollout.stop_strings:
        raise UsageError("rollout.stop_strings holds an empty text, which ends every completion")
    _check_shapes(config)
    _check_shaping(config)
    _check_objective(config)


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
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "training.logits_mib",
        "training.max_skipped",
        "evaluation.max_new_tokens",
        "evaluation.slots",
        "report.samples_every",
        "rewards.workers",
        "generate.completions",
        "generate.num_prompts",
        "inspect.rows",
    )
    _at_least(
        config,
        0,
        "seed",
        "evaluation.every",
        "report.samples_per_step",
        "training.gradient_norms_every",
        "plan.search_seconds",
        "generate.temperature",
    )
    if not math.isfinite(config.rewards.correct_threshold):
        raise UsageError(
            f"rewards.correct_threshold = {config.rewards.correct_threshold} is not finite"
        )
    for key in ("training.rows_per_microbatch", "training.memory_mib"):
        if _value(config, key) not in ("auto", None):
            _at_least(config, 1, key)
    _above_zero(config, "rollout.temperature", "rewards.timeout_seconds")
    beyond = set(config.training.profile_steps) - set(range(1, config.training.num_steps + 1))
    if beyond:
        raise UsageError(
            f"training.profile_steps has {sorted(beyond)}, which are none of the steps from 1 to "
            f"training.num_steps = {config.training.num_steps}"
        )
    for optimizer in ("training.optimizer", "training.demonstration_optimizer"):
        _check_optimizer(config, optimizer)


def _above_zero(config: RunConfig, *keys: str) -> None:
    for key in keys:
        if not _value(config, key) > 0:
            raise UsageError(f"{key} = {_value(config, key)} is not above 0")


def _check_optimizer(config: RunConfig, section: str) -> None:
    names = ("warmup_steps", "learning_rate", "final_fraction", "weight_decay")
    _at_least(config, 0, *(f"{section}.{name}" for name in names))
    _above_zero(config, f"{section}.clip_norm")
    for key in (f"{section}.b1", f"{section}.b2"):
        if not 0 <= _value(config, key) < 1:
            raise UsageError(f"{key} = {_value(config, key)} is not in [0, 1)")
    for name in ("b1", "b2"):
        own, default = _value(config, f"{section}.{name}"), vars(OptimizerConfig())[name]
        if _value(config, f"{section}.name") == "adafactor" and own != default:
            raise UsageError(f"{section}.{name} = {own} says nothing to {section}.name = adafactor")


def _check_shapes(config: RunConfig) -> None:
    """Group sizes, row lengths and splits that cannot work whatever the data."""
    rollout, training = config.rollout, config.training
    objective = config.objective
    compared = rollout.completions_per_prompt - (objective.prefix == "one")
    if objective.advantage_std and compared == 1:
        raise UsageError(
            f"rollout.completions_per_prompt = {rollout.completions_per_prompt} with "
            f"objective.prefix = {objective.prefix} leaves one completion to take a standard "
            "deviation over; sample one more or set objective.advantage_std to false"
        )
    if config.data.prompts_per_step % training.updates_per_rollout:
        raise UsageError(
            f"data.prompts_per_step = {config.data.prompts_per_step} does not split into "
            f"training.updates_per_rollout = {training.updates_per_rollout} equal parts"
        )
    longest, demonstration = config.longest_sequence, config.longest_demonstration
    answer = f"rollout.max_new_tokens = {rollout.max_new_tokens}"
    if demonstration > rollout.max_new_tokens:
        answer = f"data.max_demonstration_tokens = {demonstration}"
    if longest > training.row_length:
        raise UsageError(
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens} and "
            f"{answer} make sequences of up to {longest} tokens, which do not fit "
            f"training.row_length = {training.row_length}"
        )


def _check_shaping(config: RunConfig) -> None:
    """Terms of the reward that can be told apart, with options that their kinds have."""
    kinds = [term.kind for term in config.rewards.shaping]
    for term in config.rewards.shaping:
        if kinds.count(term.kind) > 1:
            raise UsageError(f"rewards.shaping names {term.kind} twice")
        if not math.isfinite(term.weight):
            raise UsageError(f"rewards.shaping has {term.kind} with weight {term.weight}")
        check_options(term.kind, term.options)


def _check_objective(config: RunConfig) -> None:
    """Steps and group sizes that the objective needs; its coefficients are checked by then."""
    objective, group_size = config.objective, config.rollout.completions_per_prompt
    if _value(config, "objective.sft_steps") >= config.training.num_steps:
        raise UsageError(
            f"objective.sft_steps = {objective.sft_steps} leaves none of training.num_steps = "
            f"{config.training.num_steps} to the objective itself"
        )
    if objective.gate != "none" and _value(config, "objective.gate_solved") >= group_size:
        raise UsageError(
            f"objective.gate_solved = {objective.gate_solved} lets every group of "
            f"rollout.completions_per_prompt = {group_size} pass; it must be below"
        )
    longest, limit = config.longest_demonstration, config.rollout.max_new_tokens
    if objective.prefix != "none" and longest > limit:
        raise UsageError(
            f"objective.prefix = {objective.prefix} starts completions of up to "
            f"rollout.max_new_tokens = {limit} with parts of demonstrations of up to "
            f"data.max_demonstration_tokens = {longest}, which must not be longer"
        )
    if objective.prefix == "one" and group_size == 1:
        raise UsageError(
            "objective.prefix = one takes one completion of a group, which leaves none of "
            "rollout.completions_per_prompt = 1 without a prefix"
        )
