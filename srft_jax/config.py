"""Every knob of a run: frozen dataclasses, one section per room. Nothing else reads YAML or flags.

`parse` turns `run.py VERB --config FILE --section.key VALUE` into a verb and a `RunConfig`. A
mistake of the user is a `UsageError`: one sentence that names the key.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import jsonargparse
import yaml

Verb = Literal["train", "evaluate", "generate", "export", "report", "replay"]

# What a sum over tokens is divided by, see objectives/rows.py.
Aggregation = Literal["tokens", "sequences", "length_cap", "sequence_caps"]


class UsageError(ValueError):
    """The user asked for something that cannot be run. Only the text is shown; exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on. Only the text is shown; exit code 1."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder, in the words of a Hugging Face config.json.

    Args:
        family: Key of the parameter table in models/families.py.
        vocab_size: Rows of the embedding, V.
        dim: Width of the residual stream, D.
        num_layers: Decoder blocks, L.
        num_heads: Query heads, N.
        num_kv_heads: Key and value heads, K; divides num_heads.
        head_dim: Width of one head, H; even.
        mlp_dim: Hidden width of the gated MLP, F.
        rope_theta: Base of the rotary frequencies.
        norm_epsilon: Added to the mean square in RMSNorm.
        tie_embeddings: Use the embedding, transposed, as the output head.
        max_positions: Longest sequence the model is declared for.
        init_std: Standard deviation of random initial matrices.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 1_000_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 4096
    init_std: float = 0.02
    family: Literal["qwen2"] = "qwen2"


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Where the weights come from and how they are computed with.

    Args:
        path: Hugging Face directory to start from; excludes `architecture`.
        architecture: Start from random weights of this shape; excludes `path`.
        tokenizer: Hugging Face directory of the tokenizer; by default `path`.
        reference: Hugging Face directory of the reference policy, for objectives with a KL; by
            default `path`, also after a first stage of SFT.
        dtype: Of activations and matmul inputs. Parameters, log-probs and losses stay float32.
        remat: What of a block the backward pass computes again: nothing, all but the matmuls
            (dots), or the whole block. Less memory; on a CPU dots is also the fastest.
    """

    path: str | None = None
    architecture: ModelConfig | None = None
    tokenizer: str | None = None
    reference: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "block"] = "dots"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices.

    Args:
        data: Replicas of the parameters; -1 takes the devices that the other axes leave.
        fsdp: Shards of parameters, optimizer state and batch rows.
        tensor: Shards of heads, MLP columns and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Procedural chains of single-digit arithmetic, see data/arithmetic.py.

    Args:
        seed: Of the problems; the run's seed does not change the sets.
        operators: Some of +, - and *, each once.
        min_terms: Fewest terms of a training or held-out problem.
        max_terms: Most terms of a training or held-out problem.
        ood_min_terms: Fewest terms of an out-of-distribution problem; above max_terms.
        ood_max_terms: Most terms of an out-of-distribution problem.
        num_train: Distinct training prompts.
        num_demonstrated: How many of them come with a demonstration.
        terse_fraction: Share of the demonstrations that give the answer without working it out.
        num_held_out: Held-out problems.
        num_ood: Out-of-distribution problems.
    """

    seed: int = 0
    operators: str = "+-*"
    min_terms: int = 4
    max_terms: int = 6
    ood_min_terms: int = 7
    ood_max_terms: int = 8
    num_train: int = 4096
    num_demonstrated: int = 512
    terse_fraction: float = 0.0
    num_held_out: int = 512
    num_ood: int = 256


@dataclasses.dataclass(frozen=True)
class JsonlConfig:
    """Files of one object a line: {"prompt": str, "answer": str, "demonstrations": [str, ...]}.

    Args:
        train: Training rows.
        held_out: Held-out rows, evaluated as `held_out`; left out when null.
        ood: Out-of-distribution rows, evaluated as `ood`; left out when null.
    """

    train: str
    held_out: str | None = None
    ood: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts, gold answers and demonstrations; exactly one of `arithmetic` and `jsonl` is set.

    Args:
        arithmetic: Procedural problems of the project's own.
        jsonl: The user's files.
        prompts_per_step: Distinct prompts of one rollout batch, P.
        max_prompt_tokens: A longer prompt is an error.
    """

    arithmetic: ArithmeticConfig | None = None
    jsonl: JsonlConfig | None = None
    prompts_per_step: int = 32
    max_prompt_tokens: int = 32


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled during training.

    Args:
        completions_per_prompt: Group size G; the demonstration comes on top.
        temperature: Of sampling, and of the log-probs and entropies of the loss.
        max_new_tokens: Longest completion; also the longest demonstration.
        slots: Most completions decoded side by side.
        segment: Decode steps between two looks at what has finished.
    """

    completions_per_prompt: int = 7
    temperature: float = 1.0
    max_new_tokens: int = 64
    slots: int = 256
    segment: int = 16


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """Verification of completions.

    Args:
        workers: Processes.
        timeout_seconds: Of one verdict; past it the worker is killed and the verdict is `timeout`.
        correct_threshold: A reward that reaches it counts as correct.
    """

    workers: int = 2
    timeout_seconds: float = 2.0
    correct_threshold: float = 1.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: a preset, and what departs from it. None means: as the preset says.

    The presets stand in objectives/methods.py, the formula in objectives/loss.py.

    Args:
        preset: Row of the table of methods.
        expanded_from: Written by a run beside the coefficients of its preset: naming another preset
            on top of a stored configuration is refused, as it would change nothing.
        demo_nll: Weight a of the demonstrations' negative log-likelihood.
        demo_nll_entropy: Sign s in a * exp(s * H); 0 leaves the entropy out.
        demo_nll_probability: Factor of a, without gradient: none, p, or p(1-p).
        demo_policy: Weight of the demonstrations' policy gradient.
        demo_ratio_gamma: Shaping in rho = r / (r + gamma) with r = p / p_behavior; 0 gives rho = r.
        demo_source: Each prompt's group brings its own demonstration, or demonstrations come from
            an iterator of their own.
        demo_per_step: Demonstrations a step from that iterator.
        demo_buffer: Above 0, demonstrations wait until so many are there, and are then trained on
            in a step of their own, by training.demonstration_optimizer.
        gate: Which prompts give a demonstration: every one; those of at most gate_solved correct
            completions (`demonstrations`); or these their demonstration alone and the others their
            completions alone (`either`).
        gate_solved: Correct completions of a prompt, up to which its demonstration is used.
        sft_steps: Steps of plain SFT before the first rollout, by training.demonstration_optimizer.
        mix: Terms of demonstrations and completions are summed, or weighted mu and 1 - mu.
        mix_start: mu of the first step.
        mix_end: mu from step mix_steps on; a cosine in between.
        mix_steps: Length of that cosine.
        self_form: How completions enter: not at all, by policy gradient, or by likelihood (up if
            correct, down if not).
        self_positive: Weight of completions with A > 0 (policy_gradient), correct ones
            (likelihood).
        self_positive_entropy: Sign s in self_positive * exp(s * H); 0 leaves the entropy out.
        self_negative: Weight of all other completions.
        surrogate: The policy gradient of completions: PPO's clip; CISPO, whose clipped ratio takes
            no gradient; or GSPO, whose ratio is that of the whole sequence.
        clip_low: Ratio clipped from below at 1 - clip_low.
        clip_high: Ratio clipped from above at 1 + clip_high.
        dual_clip: For A < 0 the loss is at most dual_clip * -A; inf is off.
        old_logprobs: Behind the ratio: the sampler's, or computed again by the trainer before the
            first update of a rollout.
        importance_cap: With the trainer's, p_old / p_sampler weighs a token, cut at this.
        keep: Train on all completions, or on the correct ones that ended by themselves.
        mask_truncated: Leave out completions that were cut at the length cap.
        overlong_buffer: The reward falls linearly to -1 more over this last share of the length
            cap; 0 is off.
        drop_zero_std: Leave out groups whose rewards are all equal.
        max_refills: Rollouts of further prompts a step to replace the groups left out.
        prefix: Which completions of a group start with a part of the demonstration.
        prefix_start: Largest share of the demonstration.
        prefix_end: Where it, or with prefix_chunks = 0 its lower bound, has fallen to by a cosine.
        prefix_steps: Length of that cosine.
        prefix_until: Steps after which there are no prefixes.
        prefix_chunks: The share is Binomial(chunks, share) / chunks; 0 draws it uniformly between
            the falling lower bound and prefix_start.
        hint_nll: Weight of the prefix's negative log-likelihood.
        prefix_policy: Weight of the prefix's policy gradient.
        prefix_top_entropy: Share of the prefix's tokens, those of highest entropy, that it takes.
        entropy_scope: H of the token, its sequence's mean, or the previous step's mean of its role,
            which is 0 before the first step.
        advantage_group: Mean and std over completions alone, or over completions and demonstration.
        advantage_std: Divide the advantage by the group's std.
        kl: Weight beta of the KL to model.reference.
        kl_estimator: k1, k2, k3 of the sampled token, or the exact KL over the whole vocabulary.
        kl_role: On completions or on demonstrations.
        entropy_bonus: Weight d of -H on tokens of completions and whole demonstrations.
        demo_aggregation: Normaliser of likelihoods of given text, see objectives/rows.py.
        policy_aggregation: Normaliser of every other term.
    """

    preset: Literal[
        "srft",
        "srft_paper",
        "srft_official",
        "srft_hpt",
        "sft",
        "sft_kl",
        "dft",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "sft_rl",
        "sft_plus_rl",
        "luffy",
        "chord",
        "chord_phi",
        "hpt",
        "relift",
        "uft",
        "prefix_rft",
        "on_policy_sft",
    ] = "srft"
    expanded_from: str | None = None
    # Demonstrations.
    demo_nll: float | None = None
    demo_nll_entropy: Literal[-1, 0, 1] | None = None
    demo_nll_probability: Literal["none", "p", "p(1-p)"] | None = None
    demo_policy: float | None = None
    demo_ratio_gamma: float | None = None
    demo_source: Literal["group", "own"] | None = None
    demo_per_step: int | None = None
    demo_buffer: int | None = None
    gate: Literal["none", "demonstrations", "either"] | None = None
    gate_solved: int | None = None
    sft_steps: int | None = None
    mix: Literal["sum", "share"] | None = None
    mix_start: float | None = None
    mix_end: float | None = None
    mix_steps: int | None = None
    # Completions.
    self_form: Literal["none", "policy_gradient", "likelihood"] | None = None
    self_positive: float | None = None
    self_positive_entropy: Literal[-1, 0, 1] | None = None
    self_negative: float | None = None
    surrogate: Literal["ppo", "cispo", "gspo"] | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    old_logprobs: Literal["sampler", "trainer"] | None = None
    importance_cap: float | None = None
    keep: Literal["all", "correct"] | None = None
    mask_truncated: bool | None = None
    overlong_buffer: float | None = None
    drop_zero_std: bool | None = None
    max_refills: int | None = None
    # Completions that start with a part of a demonstration.
    prefix: Literal["none", "one", "all"] | None = None
    prefix_start: float | None = None
    prefix_end: float | None = None
    prefix_steps: int | None = None
    prefix_until: int | None = None
    prefix_chunks: int | None = None
    hint_nll: float | None = None
    prefix_policy: float | None = None
    prefix_top_entropy: float | None = None
    # All.
    entropy_scope: Literal["token", "sequence", "batch"] | None = None
    advantage_group: Literal["self", "augmented"] | None = None
    advantage_std: bool | None = None
    kl: float | None = None
    kl_estimator: Literal["k1", "k2", "k3", "full"] | None = None
    kl_role: Literal["self", "demo"] | None = None
    entropy_bonus: float | None = None
    demo_aggregation: Aggregation | None = None
    policy_aggregation: Aggregation | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then constant or cosine decay.

    Args:
        learning_rate: Peak.
        warmup_steps: Optimizer steps until the peak, in equal rises.
        schedule: What follows the warm-up, until training.num_steps.
        final_fraction: Of the peak, at the end of a cosine.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        weight_decay: Decoupled; applied to matrices only.
        clip_norm: Global norm the gradient is clipped to.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 10
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Args:
        num_steps: Rollout steps.
        updates_per_rollout: Optimizer steps each rollout batch is split into, by prompts.
        row_length: Tokens of a packed row, T.
        rows_per_microbatch: Rows of one forward and backward pass, B.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: How many are kept.
        logits_mib: Memory for tiles of logits on each device; see ops/head.py.
        max_skipped: Updates in a row with a loss or gradient that is not finite: they are skipped,
            and at this many the run stops.
        gradient_norms_every: Steps between measurements of each loss term's own gradient norm; 0
            never measures.
        optimizer: AdamW.
        demonstration_optimizer: Of steps on demonstrations alone: the first stage of sft_rl, the
            buffered ones of relift.
    """

    num_steps: int = 100
    updates_per_rollout: int = 1
    row_length: int = 128
    rows_per_microbatch: int = 64
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    logits_mib: int = 64
    max_skipped: int = 3
    gradient_norms_every: int = 0
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    demonstration_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Greedy pass@1 on the held-out and out-of-distribution sets: before, during and after.

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
class GenerateConfig:
    """The verb `generate`.

    Args:
        prompt: Text of one user turn; by default the first prompts of the held-out set.
        num_prompts: Held-out prompts completed when no prompt is given.
        temperature: 0 is greedy.
        completions: Per prompt.
    """

    prompt: str | None = None
    num_prompts: int = 4
    temperature: float = 0.0
    completions: int = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run.

    Args:
        run_dir: Directory of everything the run writes; a run in it is continued.
        seed: Of initial weights, data order and sampling.
        model: Weights and precision.
        mesh: Devices.
        data: Prompts and demonstrations.
        rollout: Sampling during training.
        rewards: Verification.
        objective: The loss.
        training: The loop and the optimizer.
        evaluation: Scores.
        generate: The verb `generate`.
        report: What the run shows.
    """

    run_dir: str = "runs/default"
    seed: int = 0
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    rewards: RewardsConfig = dataclasses.field(default_factory=RewardsConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)


def parse(argv: Sequence[str]) -> tuple[Verb, RunConfig]:
    """The verb and the configuration that a command line asks for.

    Args:
        argv: Without the program: [verb] [--config FILE] [--section.key VALUE ...].

    Raises:
        UsageError: an unknown or ill-typed key, or a file that cannot be read.
    """
    verbs = get_args(Verb)
    verb, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if verb not in verbs:
        raise UsageError(f"unknown verb {verb!r}; the verbs are {', '.join(verbs)}")
    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        usage=f"run.py [{'|'.join(verbs)}] [options]",
        exit_on_error=False,
        allow_abbrev=False,  # `--training.num_step` is a mistake, not num_steps
    )
    parser.add_argument("--config", action="config", help="YAML file of this page's keys")
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    try:
        values = parser.instantiate(parser.parse_args(list(flags)))
    except jsonargparse.ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    fields = {field.name: values[field.name] for field in dataclasses.fields(RunConfig)}
    return cast(Verb, verb), RunConfig(**fields)


def to_yaml(config: RunConfig) -> str:
    """The configuration as a file that `parse` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_yaml(text: str) -> Any:
    """Plain values of a stored configuration, which need not load as today's `RunConfig`.

    Raises:
        UsageError: the text is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from error
