"""What every verb starts from: checked configuration, data as text and as ids, architecture, mesh.

Everything a user can get wrong is found here, before anything compiles.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from srft_jax.config import ModelConfig, ObjectiveConfig, RunConfig, UsageError
from srft_jax.data.encoding import EncodedExample, EncodedSets, encode_sets
from srft_jax.data.examples import Example, ExampleSets
from srft_jax.data.sources import load_sets
from srft_jax.mesh import make_mesh
from srft_jax.models.checkpoint_hf import load_hf
from srft_jax.models.config_hf import read_config
from srft_jax.models.decoder import Params, Runtime, init_params
from srft_jax.models.tokenizer import Tokenizer, load_tokenizer
from srft_jax.objectives.methods import Objective, expand
from srft_jax.objectives.rows import max_microbatches
from srft_jax.rewards import RewardPool
from srft_jax.tasks.checks import check_config
from srft_jax.training.state import param_shardings


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything about a run but its state.

    Attributes:
        config: As asked for, the objective's preset expanded.
        objective: Coefficients of the loss.
        tokenizer: Of the model.
        sets: Problems as text.
        encoded: The same problems as ids.
        model_config: Architecture.
        mesh: Devices.
    """

    config: RunConfig
    objective: Objective
    tokenizer: Tokenizer
    sets: ExampleSets
    encoded: EncodedSets
    model_config: ModelConfig
    mesh: Mesh

    @property
    def runtime(self) -> Runtime:
        return Runtime(dtype=self.config.model.dtype, remat=self.config.model.remat)

    @property
    def evaluation_sets(self) -> dict[str, tuple[Sequence[Example], Sequence[EncodedExample]]]:
        return {
            "held_out": (self.sets.held_out, self.encoded.held_out),
            "ood": (self.sets.ood, self.encoded.ood),
        }

    @property
    def longest_sequence(self) -> int:
        """Inputs of the longest prompt and completion; the last token is a target only."""
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens - 1

    @property
    def sequences_per_update(self) -> int:
        """At most: every prompt with all its completions and a demonstration."""
        prompts = self.config.data.prompts_per_step // self.config.training.updates_per_rollout
        own = self.config.rollout.completions_per_prompt if self.objective.uses_rollouts else 0
        return prompts * (own + self.objective.uses_demonstrations)

    @property
    def num_microbatches(self) -> int:
        """M, the static number of microbatches of a batch."""
        return max_microbatches(
            self.sequences_per_update, self.longest_sequence, self.config.training
        )


def prepare(config: RunConfig) -> Setup:
    """Checks the configuration and reads data, tokenizer and architecture.

    Raises:
        UsageError: naming the key or the row that cannot be run.
    """
    objective = expand(config.objective)
    expanded = ObjectiveConfig(
        preset=config.objective.preset,
        expanded_from=config.objective.preset,
        **dataclasses.asdict(objective),
    )
    config = dataclasses.replace(config, objective=expanded)
    check_config(config)
    tokenizer = load_tokenizer(_tokenizer_path(config))
    sets = load_sets(config.data)
    if not objective.uses_rollouts:  # nothing is learned from a prompt alone
        demonstrated = tuple(example for example in sets.train if example.demonstrations)
        sets = dataclasses.replace(sets, train=demonstrated)
    encoded = encode_sets(
        sets,
        tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    architecture = _architecture(config)
    setup = Setup(config, objective, tokenizer, sets, encoded, architecture, make_mesh(config.mesh))
    _check_together(setup)
    return setup


def load_params(setup: Setup) -> Params:
    """Initial float32 parameters, on their shards: from `model.path`, or random from the seed."""
    if setup.config.model.path is not None:
        return load_hf(setup.config.model.path, mesh=setup.mesh)[1]
    shardings = param_shardings(setup.mesh, setup.model_config)
    init = jax.jit(lambda key: init_params(setup.model_config, key), out_shardings=shardings)
    return init(jax.random.fold_in(jax.random.key(setup.config.seed), 0))


def reward_pool(setup: Setup) -> RewardPool:
    """The verifiers that the data asks for.

    Raises:
        UsageError: a kind that is neither ours nor an importable function.
    """
    sets = (setup.sets.train, setup.sets.held_out, setup.sets.ood)
    kinds = sorted({example.kind for examples in sets for example in examples})
    rewards = setup.config.rewards
    return RewardPool(rewards.workers, rewards.timeout_seconds, kinds=kinds)


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
        return read_config(Path(path))
    if architecture is not None and path is None:
        return architecture
    raise UsageError("exactly one of model.path and model.architecture must be set")


def _check_together(setup: Setup) -> None:
    """What only shows once data, model and devices are known."""
    config, model = setup.config, setup.model_config
    for name, size in vars(model).items():
        if type(size) is int and size < 1:  # a bool is an int, but not a size
            raise UsageError(f"the model has {name} = {size}, which is below 1")
    if model.num_heads % model.num_kv_heads or model.head_dim % 2:
        raise UsageError(
            f"the model has num_heads = {model.num_heads}, num_kv_heads = {model.num_kv_heads}, "
            f"head_dim = {model.head_dim}; kv heads must divide heads, and head_dim must be even"
        )
    if setup.tokenizer.vocab_size > model.vocab_size:
        raise UsageError(
            f"the tokenizer has {setup.tokenizer.vocab_size} tokens, "
            f"but the model's vocabulary only {model.vocab_size}"
        )
    longest = config.data.max_prompt_tokens + max(
        config.rollout.max_new_tokens, config.evaluation.max_new_tokens
    )
    if longest > model.max_positions:
        raise UsageError(
            f"prompt and completion of up to {longest} tokens exceed "
            f"the model's {model.max_positions}"
        )
    demonstrated = sum(bool(example.demonstrations) for example in setup.sets.train)
    if setup.objective.uses_demonstrations and not demonstrated:
        raise UsageError(
            f"objective.preset = {config.objective.preset} trains on demonstrations, "
            "but no training prompt has one"
        )
    if config.data.prompts_per_step > len(setup.sets.train):
        raise UsageError(
            f"data.prompts_per_step = {config.data.prompts_per_step} exceeds the "
            f"{len(setup.sets.train)} prompts that objective.preset = {config.objective.preset} "
            "can train on"
        )
    reward_pool(setup)  # raises on a kind that does not exist; starts nothing
    ways = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    if config.training.rows_per_microbatch % ways:
        raise UsageError(
            f"training.rows_per_microbatch = {config.training.rows_per_microbatch} does not split "
            f"over the {ways} data-parallel devices of the mesh"
        )
