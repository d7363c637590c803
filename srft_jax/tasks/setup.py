"""What every verb starts from: checked configuration, data as text and as ids, architecture, mesh.

Everything a user can get wrong is found here, before anything compiles.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from srft_jax.config import ModelConfig, ModelSection, ObjectiveConfig, RunConfig, UsageError
from srft_jax.data.encoding import Dropped, EncodedExample, EncodedSets, Limits, encode_sets
from srft_jax.data.examples import Example, ExampleSets
from srft_jax.data.problems import raise_problems
from srft_jax.data.sources import load_sets
from srft_jax.evaluation.verdicts import probes, row_problems
from srft_jax.mesh import make_mesh
from srft_jax.models import lora
from srft_jax.models.config_hf import check_architecture, read_config
from srft_jax.models.decoder import HOST_MEMORY, Runtime
from srft_jax.models.kernels import resolve_attention
from srft_jax.models.tokenizer import Tokenizer, load_tokenizer
from srft_jax.objectives.methods import expand
from srft_jax.objectives.objective import Objective
from srft_jax.objectives.rows import max_microbatches
from srft_jax.ops.attention import Kernel
from srft_jax.rewards import RewardPool
from srft_jax.rollout import SamplingConfig, Truncation
from srft_jax.tasks.checks import check_config
from srft_jax.tasks.stages import Stage, buffered_stage, policy_stage, sft_stage


@dataclasses.dataclass(frozen=True)
class Outline:
    """A run without its data and its weights: what its programs are compiled from.

    Attributes:
        config: As asked for, the objective's preset expanded.
        objective: Coefficients of the loss.
        model_config: Architecture, with its adapters where `model.lora` is set.
        mesh: Devices.
    """

    config: RunConfig
    objective: Objective
    model_config: ModelConfig
    mesh: Mesh

    def attention(self) -> Kernel:
        """That the devices and the model take; UsageError on one that they cannot."""
        model, device = self.config.model, self.mesh.devices.flat[0]
        return resolve_attention(model.attention, device.platform, self.model_config, model.dtype)

    @property
    def runtime(self) -> Runtime:
        model = self.config.model
        return Runtime(dtype=model.dtype, remat=model.remat, attention=self.attention())

    def sampling(
        self,
        *,
        temperature: float,
        max_new_tokens: int,
        slots: int,
        truncation: Truncation = Truncation(),
    ) -> SamplingConfig:
        """The rest is the same for rollouts, evaluations and generation."""
        rollout = self.config.rollout
        return SamplingConfig(
            temperature=temperature,
            truncation=truncation,
            max_new_tokens=max_new_tokens,
            slots=slots,
            segment=rollout.segment,
            cache_mib=rollout.cache_mib,
            dtype=self.config.model.dtype,
            attention=self.attention(),
            tensor=rollout.tensor,
        )

    @property
    def rollout_sampling(self) -> SamplingConfig:
        """Of the completions that are trained on."""
        wanted = self.config.rollout
        return self.sampling(
            temperature=wanted.temperature,
            max_new_tokens=wanted.max_new_tokens,
            slots=wanted.slots,
            truncation=Truncation(wanted.top_k, wanted.top_p, wanted.min_p),
        )

    @property
    def evaluation_sampling(self) -> SamplingConfig:
        """Greedy."""
        wanted = self.config.evaluation
        return self.sampling(
            temperature=0.0, max_new_tokens=wanted.max_new_tokens, slots=wanted.slots
        )

    @property
    def longest_sequence(self) -> int:
        """Inputs of the longest prompt and completion; the last token is a target only."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens - 1

    @property
    def base_is_reference(self) -> bool:
        """The frozen parameters of a run with LoRA are those of the reference policy."""
        return self.config.model.lora is not None and self.config.model.reference is None

    @property
    def reference_path(self) -> str | None:
        """Hugging Face directory of the reference policy."""
        return self.config.model.reference or self.config.model.path

    def stage_at(self, step: int) -> Stage:
        """Which objective and optimizer a step is made with; steps count from 1."""
        if step <= self.objective.sft_steps:
            return sft_stage(self.config)
        return policy_stage(self.config, self.objective)

    @property
    def buffered_stage(self) -> Stage:
        """Updates on buffered demonstrations, between those of the other stages."""
        return buffered_stage(self.objective)

    @property
    def stages(self) -> list[Stage]:
        """All that the run has."""
        ends = [self.stage_at(1), self.stage_at(self.config.training.num_steps)]
        buffered = [self.buffered_stage] if self.objective.demo_buffer else []
        return list(dict.fromkeys(ends + buffered))

    def num_microbatches(self, stage: Stage) -> int:
        """M, the static number of microbatches of the stage's batches."""
        return max_microbatches(
            stage.sequences_per_update, self.longest_sequence, self.config.training
        )


@dataclasses.dataclass(frozen=True)
class Setup(Outline):
    """Everything about a run but its state.

    Attributes:
        tokenizer: Of the model.
        sets: Problems as text.
        encoded: The same problems as ids.
        dropped: By set, what was too long for it.
    """

    tokenizer: Tokenizer
    sets: ExampleSets
    encoded: EncodedSets
    dropped: Mapping[str, Dropped]

    @property
    def evaluation_sets(self) -> dict[str, tuple[Sequence[Example], Sequence[EncodedExample]]]:
        return {
            name: (examples, self.encoded.evaluation[name])
            for name, examples in self.sets.evaluation.items()
        }


def prepare(config: RunConfig) -> Setup:
    """Checks the configuration and reads data, tokenizer and architecture.

    Raises:
        UsageError: naming the key or the row that cannot be run.
    """
    config, objective = expanded(config)
    check_config(config)
    tokenizer = load_tokenizer(_tokenizer_path(config), config.model.chat_template)
    data = config.data
    sets, encoded, dropped = encode_sets(
        load_sets(data),
        tokenizer,
        Limits(data.max_prompt_tokens, config.rollout.max_new_tokens, data.too_long),
        system_prompt=data.system_prompt,
    )
    architecture, mesh = _architecture(config), make_mesh(config.mesh)
    architecture = lora.adapted(architecture, config.model.lora)
    setup = Setup(config, objective, architecture, mesh, tokenizer, sets, encoded, dropped)
    _check_model(setup)
    _check_offload(setup)
    check_export(config)
    _check_reference(setup)
    _check_data(setup)
    return setup


def expanded(config: RunConfig) -> tuple[RunConfig, Objective]:
    """The configuration with its preset's coefficients filled in, and these."""
    objective = expand(config.objective)
    of_preset = ObjectiveConfig(
        preset=config.objective.preset,
        expanded_from=config.objective.preset,
        **dataclasses.asdict(objective),
    )
    return dataclasses.replace(config, objective=of_preset), objective


def reward_pool(setup: Setup) -> RewardPool:
    """The verifiers that the data and rewards.shaping ask for, to be tried on the first rows.

    Raises:
        UsageError: a kind that is neither ours nor an importable function, or an unknown option.
    """
    sets = {"train": setup.sets.train, **setup.sets.evaluation}
    rewards = setup.config.rewards
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
        return overridden(architecture, config.model)
    raise UsageError("exactly one of model.path and model.architecture must be set")


def overridden(architecture: ModelConfig, section: ModelSection) -> ModelConfig:
    """With what the run has in place of the model's own, and what it will export."""
    names = ("rope_theta", "max_positions", "rope_scaling")
    given = {name: value for name in names if (value := getattr(section, name)) is not None}
    changed = dataclasses.replace(architecture, **given)
    check_architecture(changed, "the model")
    return changed


def _check_model(setup: Setup) -> None:
    """Sizes of the architecture beside tokenizer, lengths and devices."""
    model = setup.model_config
    if setup.tokenizer.vocab_size > model.vocab_size:
        raise UsageError(
            f"the tokenizer has {setup.tokenizer.vocab_size} tokens, "
            f"but the model's vocabulary only {model.vocab_size}"
        )
    check_sizes(setup)


def check_sizes(run: Outline) -> None:
    """Lengths beside the architecture's, rows beside the mesh, and the kernel beside both."""
    config, model = run.config, run.model_config
    run.attention()
    longest = config.data.max_prompt_tokens + max(
        config.rollout.max_new_tokens, config.evaluation.max_new_tokens
    )
    if longest > model.max_positions:
        raise UsageError(
            f"prompt and completion of up to {longest} tokens exceed "
            f"the model's {model.max_positions}"
        )
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    rows = config.training.rows_per_microbatch
    if rows != "auto" and rows % ways:
        raise UsageError(
            f"training.rows_per_microbatch = {rows} does not split "
            f"over the {ways} data-parallel devices of the mesh: it must be a multiple of {ways}"
        )
    chunks = 2 * run.mesh.shape["context"]
    if chunks > 2 and config.training.row_length % chunks:
        raise UsageError(
            f"training.row_length = {config.training.row_length} does not split into the {chunks} "
            f"chunks that mesh.context = {chunks // 2} takes, two for each device"
        )


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
    lost = setup.dropped["train"].demonstrations
    limit = setup.config.rollout.max_new_tokens
    return f": {lost} were dropped, longer than rollout.max_new_tokens = {limit}" if lost else ""


def _check_data(setup: Setup) -> None:
    """Enough prompts and demonstrations, and verifiers for all of them."""
    config, objective = setup.config, setup.objective
    preset, prompts = config.objective.preset, config.data.prompts_per_step
    demonstrated = sum(bool(example.demonstrations) for example in setup.sets.train)
    if objective.uses_demonstrations and not demonstrated:
        raise UsageError(
            f"objective.preset = {preset} trains on demonstrations, but no training prompt has one"
            + _lost_demonstrations(setup)
        )
    # Nothing is learned from a prompt alone where there are no rollouts.
    only_demonstrated = objective.sft_steps or not objective.uses_rollouts
    usable = demonstrated if only_demonstrated else len(setup.sets.train)
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
    sets, rewards = {"train": setup.sets.train, **setup.sets.evaluation}, config.rewards
    raise_problems(list(row_problems(sets, rewards.shaping, rewards.options)))
    reward_pool(setup)  # raises on options that do not exist; starts nothing
