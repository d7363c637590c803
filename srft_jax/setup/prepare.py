"""What every verb starts from: checked configuration, data as text and as ids, architecture, mesh.

Everything a user can get wrong is found here, before anything compiles.
"""

import dataclasses

from srft_jax.config import RewardsConfig, RunConfig, UsageError
from srft_jax.data.encoding import EncodedSets, Limits, encode_sets
from srft_jax.data.sources import load_sets
from srft_jax.data.verifier_requests import probes
from srft_jax.mesh import decode_mesh
from srft_jax.models.tokenizer import Tokenizer, load_tokenizer
from srft_jax.rewards import RewardPool
from srft_jax.setup.architecture import run_architecture
from srft_jax.setup.config_checks import check_config
from srft_jax.setup.data_checks import check_data
from srft_jax.setup.model_checks import (
    check_export,
    check_offload,
    check_reference,
    check_stop_strings,
    check_vocabulary,
)
from srft_jax.setup.outline import Outline, make_outline, with_coefficients


@dataclasses.dataclass(frozen=True)
class Setup(Outline):
    """Everything about a run but its state: a verb hands its parts to the functions that use them.

    Attributes:
        tokenizer: The model's tokenizer.
        data: Training and evaluation problems, as text and as ids.
    """

    tokenizer: Tokenizer
    data: EncodedSets


def prepare(config: RunConfig) -> Setup:
    """Check the configuration; read data, tokenizer and architecture.

    Raises:
        UsageError: naming the key or the row that cannot be run.
    """
    # What takes no time is checked first: to read and encode the data may take minutes.
    config = with_coefficients(config)
    check_config(config)
    check_export(config)
    tokenizer_path = _tokenizer_path(config)
    outline = make_outline(config, run_architecture(config.model))
    preset, objective = config.objective.preset, outline.objective
    decode_mesh(outline.mesh, config.rollout.tensor)  # raises where it cannot be laid out so
    check_offload(config.model.remat, outline.mesh)
    check_reference(config.model, outline.model_config, preset=preset, kl=objective.kl)
    tokenizer = load_tokenizer(tokenizer_path, config.model.chat_template)
    check_vocabulary(tokenizer, outline.model_config)
    check_stop_strings(config.rollout.stop_strings, tokenizer)
    data = _read_data(config, tokenizer)
    check_data(
        data,
        objective,
        config.rewards,
        preset=preset,
        prompts_per_step=config.data.prompts_per_step,
        max_demonstration_tokens=config.longest_demonstration,
    )
    reward_pool(data, config.rewards)  # raises on options that do not exist; starts nothing
    return Setup(**vars(outline), tokenizer=tokenizer, data=data)


def reward_pool(data: EncodedSets, rewards: RewardsConfig) -> RewardPool:
    """Return the verifiers that the data and rewards.shaping ask for, to be tried on a few rows.

    Raises:
        UsageError: a kind that is neither ours nor an importable function, or an unknown option.
    """
    kinds = {example.kind for examples in data.texts.values() for example in examples}
    return RewardPool(
        rewards.workers,
        rewards.timeout_seconds,
        kinds=sorted(kinds | {term.kind for term in rewards.shaping}),
        probes=probes(data.texts, rewards.shaping),
        options=rewards.options,
    )


def _tokenizer_path(config: RunConfig) -> str:
    path = config.model.tokenizer or config.model.path
    if path is None:
        raise UsageError(
            "no model: set model.path, or model.architecture and model.tokenizer, or start from "
            "a file in configs/ with --config"
        )
    return path


def _read_data(config: RunConfig, tokenizer: Tokenizer) -> EncodedSets:
    section = config.data
    return encode_sets(
        load_sets(section),
        tokenizer,
        Limits(section.max_prompt_tokens, config.longest_demonstration, section.too_long),
        system_prompt=section.system_prompt,
    )
