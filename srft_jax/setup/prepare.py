"""What every verb starts from: checked configuration, data as text and as ids, architecture, mesh.

Everything a user can get wrong is found here, before anything compiles.
"""

import dataclasses
from pathlib import Path

from srft_jax.config import ModelConfig, RunConfig, UsageError
from srft_jax.data.encoding import EncodedSets, Limits, encode_sets
from srft_jax.data.problems import raise_problems
from srft_jax.data.sources import load_sets
from srft_jax.data.verifier_requests import probes, row_problems
from srft_jax.mesh import make_mesh
from srft_jax.models import lora
from srft_jax.models.decoder import HOST_MEMORY
from srft_jax.models.hf_config import read_config
from srft_jax.models.tokenizer import Tokenizer, load_tokenizer
from srft_jax.rewards import RewardPool
from srft_jax.setup.config_checks import check_config
from srft_jax.setup.outline import Outline, check_sizes, expanded, overridden


@dataclasses.dataclass(frozen=True)
class Setup(Outline):
    """Everything about a run but its state, the outline included.

    Attributes:
        tokenizer: The model's tokenizer.
        data: Training and evaluation problems, as text and as ids.
    """

    tokenizer: Tokenizer
    data: EncodedSets


def prepare(config: RunConfig) -> Setup:
    """Checks the configuration and reads data, tokenizer and architecture.

    Raises:
        UsageError: naming the key or the row that cannot be run.
    """
    config, objective = expanded(config)
    check_config(config)
    tokenizer = load_tokenizer(_tokenizer_path(config), config.model.chat_template)
    section = config.data
    data = encode_sets(
        load_sets(section),
        tokenizer,
        Limits(section.max_prompt_tokens, config.max_demonstration_tokens, section.too_long),
        system_prompt=section.system_prompt,
    )
    architecture, mesh = _architecture(config), make_mesh(config.mesh)
    architecture = lora.adapted(architecture, config.model.lora)
    setup = Setup(config, objective, architecture, mesh, tokenizer, data)
    _check_model(setup)
    setup.decode_mesh()  # raises where it cannot be laid out so
    _check_offload(setup)
    check_export(config)
    _check_reference(setup)
    _check_data(setup)
    return setup


def reward_pool(setup: Setup) -> RewardPool:
    """The verifiers that the data and rewards.shaping ask for, to be tried on the first rows.

    Raises:
        UsageError: a kind that is neither ours nor an importable function, or an unknown option.
    """
    sets, rewards = setup.data.texts, setup.config.rewards
    kinds = {example.kind for examples in sets.values() for example in examples}
    return RewardPool(
        rewards.workers,
        rewards.timeout_seconds,
        kinds=sorted(kinds | {term.kind for term in rewards.shaping}),
        probes=probes(sets, rewards.shaping),
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


def _architecture(config: RunConfig) -> ModelConfig:
    path, architecture = config.model.path, config.model.architecture
    if path is not None and architecture is None:
        return overridden(read_config(Path(path)), config.model)
    if architecture is not None and path is None:
        return overridden(read_config(Path(architecture)), config.model)
    raise UsageError("exactly one of model.path and model.architecture must be set")


def _check_model(setup: Setup) -> None:
    """Sizes of the architecture beside tokenizer, lengths and devices."""
    model = setup.model_config
    if setup.tokenizer.vocab_size > model.vocab_size:
        raise UsageError(
            f"the tokenizer has {setup.tokenizer.vocab_size} tokens, "
            f"but the model's vocabulary only {model.vocab_size}"
        )
    check_sizes(setup)


def _check_offload(setup: Setup) -> None:
    """Where activations would wait is there: a process knows of its own devices."""
    device = setup.mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if setup.config.model.remat == "offload" and HOST_MEMORY not in kinds:
        raise UsageError(
            f"model.remat = offload needs {HOST_MEMORY} memory, but a {device.platform} device has "
            f"{', '.join(kinds)}; set model.remat to block"
        )


def check_export(config: RunConfig) -> None:
    """Adapters alone are of use to somebody who has the base."""
    if config.export.lora == "adapter" and (config.model.lora is None or config.model.path is None):
        missing = "model.lora" if config.model.lora is None else "model.path"
        raise UsageError(
            f"export.lora = adapter needs {missing}, which is not set: adapters alone are exported "
            "beside the model that they were trained on"
        )


# Of an architecture, what does not change the function that the weights compute.
_NOT_COMPARED = {"init_std", "max_positions"}


def _check_reference(setup: Setup) -> None:
    """A reference policy is there where one is needed, and shaped like the policy."""
    if not setup.objective.uses_reference or setup.base_is_reference:
        return
    if setup.reference_path is None:
        raise UsageError(
            f"objective.preset = {setup.config.objective.preset} needs a reference policy for its "
            f"KL (objective.kl = {setup.objective.kl}): set model.reference or model.path"
        )
    reference_config = overridden(read_config(Path(setup.reference_path)), setup.config.model)
    policy, reference = vars(lora.base(setup.model_config)), vars(reference_config)
    different = [
        f"{name} = {reference[name]} (the policy has {policy[name]})"
        for name in policy.keys() - _NOT_COMPARED
        if policy[name] != reference[name]
    ]
    if different:
        raise UsageError(
            f"the reference policy {setup.reference_path} has {', '.join(sorted(different))}"
        )


def _lost_demonstrations(setup: Setup) -> str:
    lost = setup.data.dropped["train"].demonstrations
    if not lost:
        return ""
    limit = setup.config.max_demonstration_tokens
    return f": {lost} were dropped, longer than data.max_demonstration_tokens = {limit}"


def _check_data(setup: Setup) -> None:
    """Enough prompts and demonstrations, and verifiers for all of them."""
    config, objective = setup.config, setup.objective
    preset, prompts = config.objective.preset, config.data.prompts_per_step
    demonstrated = sum(bool(problem.demonstrations) for problem in setup.data.train)
    if objective.uses_demonstrations and not demonstrated:
        raise UsageError(
            f"objective.preset = {preset} trains on demonstrations, but no training prompt has one"
            + _lost_demonstrations(setup)
        )
    # Nothing is learned from a prompt alone where there are no rollouts.
    only_demonstrated = objective.sft_steps or not objective.uses_rollouts
    usable = demonstrated if only_demonstrated else len(setup.data.train)
    if prompts > usable:
        raise UsageError(
            f"data.prompts_per_step = {prompts} exceeds the {usable} prompts that "
            f"objective.preset = {preset} can train on"
        )
    if objective.demo_source == "own" and objective.demo_per_step > demonstrated:
        raise UsageError(
            f"objective.demo_per_step = {objective.demo_per_step} exceeds the {demonstrated} "
            "training prompts with a demonstration"
        )
    rewards = config.rewards
    raise_problems(list(row_problems(setup.data.texts, rewards.shaping, rewards.options)))
    reward_pool(setup)  # raises on options that do not exist; starts nothing
