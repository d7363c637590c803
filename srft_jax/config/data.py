"""The section `data`: where rows come from and how they are read."""

import dataclasses
from typing import Any, Literal

WAYS = ("files", "hub", "procedural", "gym")  # where a source's rows come from: one key is set


@dataclasses.dataclass(frozen=True)
class ProceduralConfig:
    """Problems of the project's own, with step-by-step demonstrations; see data/procedural/.

    Args:
        family: Kind of problem.
        seed: Seed that the problems are drawn from; the run's seed does not change them.
        count: Number of distinct problems.
        demonstrated: Training problems, from the first on, that come with a demonstration; by
            default all.
        min_size: Size of the smallest problem. Each family counts sizes in its own unit (terms,
            digits, numbers), see docs/problems.md.
        max_size: Size of the largest problem.
        terse_fraction: Share of the demonstrations that give the answer without working it out.
    """

    family: Literal[
        "chain", "sums", "products", "countdown", "gcd_lcm", "number_base", "sorting"
    ] = "chain"
    seed: int = 0
    count: int = 1024
    demonstrated: int | None = None
    min_size: int = 4
    max_size: int = 6
    terse_fraction: float = 0.0


@dataclasses.dataclass(frozen=True)
class GymConfig:
    """Problems of a reasoning-gym generator; needs the extra `gym`.

    Args:
        dataset: Name of the generator, e.g. gsm_symbolic, whose worked answers are demonstrations.
        seed: Seed that the problems are drawn from.
        count: Number of distinct problems.
        options: The generator's options; reasoning-gym's GALLERY.md lists them.
    """

    dataset: str
    seed: int = 0
    count: int = 1024
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """A dataset of the Hugging Face hub; needs the extra `hub`.

    Args:
        name: owner/name, or a local folder in the hub's layout.
        subset: The dataset's configuration, where it has several.
        split: Split whose rows are read.
        revision: Commit, branch or tag.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Rows of one kind; exactly one of `files`, `hub`, `procedural` and `gym` is set.

    Args:
        files: JSONL, JSON or Parquet: a file, a folder or a glob.
        hub: A dataset of the hub.
        procedural: Problems of the project's own.
        gym: Problems of reasoning-gym.
        columns: Field of a row -> column it is read from, dots going into nested ones, e.g.
            {prompt: problem, answer: reward_model.ground_truth}; by default known schemas are
            recognised, see docs/data.md.
        answer_from: Part of its column that is the gold answer: all of it, what is in the last
            \\boxed{}, or what follows the last ####. A row without such a column has its answer in
            its demonstration.
        shuffle_options: Shuffle the options of each multiple-choice question, by a hash of it.
        instruction: Text put after every prompt, on a line of its own.
        kind: Verifier of rows that name none.
        distinct: Leave out rows whose prompt has come before.
        limit: Number of rows that are used, from the first on.
        weight: Share of the prompts in a mixture, relative to the other sources'.
    """

    files: str | None = None
    hub: HubConfig | None = None
    procedural: ProceduralConfig | None = None
    gym: GymConfig | None = None
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    answer_from: Literal["column", "boxed", "hashes"] = "column"
    shuffle_options: bool = True
    instruction: str | None = None
    kind: str | None = None
    distinct: bool = False
    limit: int | None = None
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts, gold answers and demonstrations.

    Args:
        train: Training rows from one source; excludes `mixture`.
        mixture: Training rows from several sources, drawn by their weights.
        evaluation: Evaluation sets by name, e.g. {held_out: {files: held_out.jsonl}}; the metrics
            of a set are called eval/<name>/... A set that is null is left out.
        system_prompt: System turn of every prompt that has none of its own.
        overlap: Training rows whose prompt is evaluated too are an error, or are dropped, so that
            fewer rows of their source are used.
        too_long: Prompts and demonstrations above their limit of tokens are an error, or are
            dropped and counted.
        prompts_per_step: Distinct prompts of one rollout batch, P.
        max_prompt_tokens: Longest prompt, chat template included.
        max_demonstration_tokens: Longest demonstration of a training row; by default
            rollout.max_new_tokens.
    """

    train: SourceConfig | None = None
    mixture: list[SourceConfig] = dataclasses.field(default_factory=list)
    evaluation: dict[str, SourceConfig | None] = dataclasses.field(default_factory=dict)
    system_prompt: str | None = None
    overlap: Literal["error", "drop"] = "error"
    too_long: Literal["error", "drop"] = "error"
    prompts_per_step: int = 32
    max_prompt_tokens: int = 32
    max_demonstration_tokens: int | None = None
