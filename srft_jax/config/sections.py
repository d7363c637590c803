"""Every other knob of a run: frozen dataclasses, one section per room."""

import dataclasses
from typing import Any, ClassVar, Literal

from srft_jax.config.data import DataConfig
from srft_jax.config.lora import LoraConfig
from srft_jax.config.model import RopeScaling
from srft_jax.config.objective import ObjectiveConfig
from srft_jax.config.sampling import Truncation
from srft_jax.config.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Where the weights come from and how they are computed with.

    Args:
        path: Hugging Face directory to start from; excludes `architecture`.
        architecture: Hugging Face config.json, or its directory: start from random weights of this
            shape, with standard deviation initializer_range; excludes `path`.
        tokenizer: Hugging Face directory of the tokenizer; by default `path`.
        chat_template: Jinja file used instead of the tokenizer's chat template, e.g. for a base
            model that has none; exported along.
        lora: Train low-rank adapters instead of the parameters themselves.
        reference: Hugging Face directory of the reference policy, for objectives with a KL; by
            default `path`, also after a first stage of SFT.
        rope_theta: Replaces the model's own value, also in the reference and in exports.
        max_positions: Replaces the model's own value, also in the reference and in exports.
        rope_scaling: Replaces the model's own value, also in the reference and in exports.
        dtype: Type of activations and matmul inputs. Parameters, log-probs and losses stay float32.
        remat: Part of a block that the backward pass computes again: nothing, all but the matmuls
            (dots), or the whole block. Less memory; on a CPU dots is also the fastest. With offload
            the results of the matmuls wait in the host's memory.
        matmul_precision: Precision of products of float32 matrices, on hardware that has faster
            ones than exact: JAX's default, three bfloat16 passes (high), or full float32 (highest).
        attention: Kernel of attention over packed rows and prompts; auto takes the best one that
            the devices and the model allow. See docs/kernels.md.
    """

    path: str | None = None
    architecture: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    lora: LoraConfig | None = None
    reference: str | None = None
    rope_theta: float | None = None
    max_positions: int | None = None
    rope_scaling: RopeScaling | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "block", "offload"] = "dots"
    matmul_precision: Literal["default", "high", "highest"] = "default"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"

    @property
    def base_is_reference(self) -> bool:
        """The frozen parameters of a run with LoRA are the reference policy."""
        return self.lora is not None and self.reference is None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, see docs/scaling.md. Their product is the number of devices;
    one of them may be -1, which takes the devices that the other axes leave.

    Args:
        data: Replicas of the parameters.
        fsdp: Shards of parameters, optimizer state and batch rows.
        context: Parts of each row in a train step; also replicas of the parameters.
        tensor: Shards of heads, MLP columns and vocabulary.
        slices: TPU slices that a data-centre network joins, between which only `data` exchanges;
            on GPUs, machines.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Processes that make one run together; see docs/several_processes.md.

    By default each process takes what TPU pods, SLURM and Open MPI tell it; elsewhere there is one.
    A stored configuration leaves this section out: a run may be continued with other processes.

    Args:
        coordinator: HOST:PORT of process 0; needs num_processes and process_id.
        num_processes: Number of processes; 1 by itself is one process wherever it runs.
        process_id: Number of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Truncation):
    """How completions are sampled during training.

    Args:
        completions_per_prompt: Group size G; the demonstration comes on top.
        temperature: Divides the logits in sampling, and in the log-probs and entropies of the loss.
        max_new_tokens: Longest completion.
        stop_strings: Texts that end a completion, of evaluations and the verb `generate` too,
            besides the model's own stop ids; by default none.
        slots: Most completions decoded side by side, by all devices together, rounded up.
        segment: Most decode steps between two looks at what has finished. Where completions wait
            for a slot, a segment ends as soon as an eighth of the slots is free.
        cache_mib: Memory of the KV cache on each device, which may allow fewer than `slots`; by
            default what the device has left.
        tensor: Devices that share one copy of the parameters while decoding; by default
            `mesh.tensor`. Each such group holds a whole copy, also where `mesh.fsdp` splits them.
    """

    PREFIX: ClassVar[str] = "rollout."

    completions_per_prompt: int = 7
    temperature: float = 1.0
    max_new_tokens: int = 64
    stop_strings: list[str] = dataclasses.field(default_factory=list)
    slots: int = 256
    segment: int = 64
    cache_mib: int | None = None
    tensor: int | None = None


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
    """A term added to the reward that advantages are taken over, in training only.

    Args:
        kind: A verifier, e.g. format or length, or package.module:function.
        weight: Factor of its reward; a penalty where negative.
        options: The verifier's options.
    """

    kind: str
    weight: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """Verification of completions; see docs/rewards.md.

    Args:
        workers: Processes that run verifiers.
        timeout_seconds: Most seconds of one verdict; past it the worker is killed and the verdict
            is `timeout`.
        correct_threshold: A verifier's reward that reaches it counts as correct; shaping does not.
        options: Options of the rows' verifiers, by kind, e.g. {math: {require_think: false}}; a
            row's own column of that name comes first.
        shaping: Terms added to the verifier's reward; no kind twice.
    """

    workers: int = 2
    timeout_seconds: float = 2.0
    correct_threshold: float = 1.0
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    shaping: list[ShapingConfig] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Greedy pass@1 on the sets of data.evaluation: before, during and after.

    Args:
        every: Steps between evaluations; 0 evaluates only before and after.
        max_new_tokens: Longest answer; longer problems need longer answers than training.
        slots: Most completions decoded side by side.
    """

    every: int = 50
    max_new_tokens: int = 96
    slots: int = 512


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What a run shows.

    Args:
        samples_every: Steps between completions printed with their verdict.
        samples_per_step: Completions of each step written to samples.jsonl.
    """

    samples_every: int = 25
    samples_per_step: int = 2


@dataclasses.dataclass(frozen=True)
class GenerateConfig(Truncation):
    """The verb `generate`.

    Args:
        prompt: Text of one user turn; by default the first prompts of the first set of
            data.evaluation.
        num_prompts: Prompts of that set completed when no prompt is given.
        temperature: 0 is greedy.
        completions: Completions of each prompt.
    """

    PREFIX: ClassVar[str] = "generate."

    prompt: str | None = None
    num_prompts: int = 4
    temperature: float = 0.0
    completions: int = 1


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """The verb `inspect`.

    Args:
        set: Set whose first rows are shown: `train` or the name of an evaluation set.
        rows: Packed rows of demonstrations that are printed, or prompts where there are none.
        ids: Print token ids below the text.
    """

    set: str = "train"
    rows: int = 4
    ids: bool = False


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The verb `export`, and the export at the end of training.

    Args:
        step: Step of the checkpoint that the verb exports; by default the newest.
        path: Directory to make, gs:// included; by default run_dir/hf, or run_dir/adapter for
            adapters alone.
        dtype: Type of the weights; by default the one that the run's first model was stored in,
            float32 after random initial weights.
        lora: What a run with `model.lora` exports: the whole model with the adapters merged into
            its matrices, or the adapters alone, in the format of PEFT.
    """

    step: int | None = None
    path: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lora: Literal["merged", "adapter"] = "merged"


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The verb `plan`; see docs/plan.md.

    Args:
        topology: Devices to plan for: v4, v5e, v5p, v6e or tpu7x with the sizes of a slice, e.g.
            v5p:4x4x4, cpu:8, or of GPUs h100:8, h200:8, a100:8. `--topology` for short.
        architecture: config.json or its directory, for a model.path that is not there to be read.
        mean_prompt: Tokens of a prompt; by default data.max_prompt_tokens.
        mean_completion: Tokens of an answer; by default rollout.max_new_tokens, or
            data.max_demonstration_tokens where there are no rollouts.
        search: Find the fastest mesh, microbatch and remat that fit. `--search` for short.
        search_seconds: Seconds after which no further candidate is compiled.
        scaling: Also plan for 8 to 256 chips of the kind; mesh.data takes them all.
        json: Print the figures as one line, last. `--json` for short.
    """

    topology: str | None = None
    architecture: str | None = None
    mean_prompt: int | None = None
    mean_completion: int | None = None
    search: bool = False
    search_seconds: int = 600
    scaling: bool = False
    json: bool = False


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run.

    Args:
        run_dir: Directory of everything the run writes; a run in it is continued.
        seed: Seed of initial weights, data order and sampling.
        compilation_cache: Directory of compiled programs, gs:// included, which a later start reads
            instead of compiling; `none` keeps none. By default run_dir/compilations, or the
            directory in the environment variable JAX_COMPILATION_CACHE_DIR.
        model: Weights and precision.
        mesh: Layout of the devices.
        distributed: Processes that make the run together.
        data: Prompts and demonstrations.
        rollout: Sampling during training.
        rewards: Verification.
        objective: The loss.
        training: The loop and the optimizer.
        evaluation: Scores.
        generate: The verb `generate`.
        inspect: The verb `inspect`.
        export: The verb `export`.
        plan: The verb `plan`.
        report: What the run shows.
    """

    run_dir: str = "runs/default"
    seed: int = 0
    compilation_cache: str = "auto"
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    inspect: InspectConfig = dataclasses.field(default_factory=InspectConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

    @property
    def longest_demonstration(self) -> int:
        """Most tokens of a demonstration: `data.max_demonstration_tokens` with its default."""
        limit = self.data.max_demonstration_tokens
        return self.rollout.max_new_tokens if limit is None else limit

    @property
    def longest_sequence(self) -> int:
        """Input tokens of the longest training sequence; its last token is a target only."""
        longest = max(self.rollout.max_new_tokens, self.longest_demonstration)
        return self.data.max_prompt_tokens + longest - 1
