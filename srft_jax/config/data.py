"""The section `data`: where rows come from and how they are read."""

import dataclasses
from typing import Any, Literal

WAYS = ("files", "hub", "procedural", "gym")  # keys of a source, of which it has one


@dataclasses.dataclass(frozen=True)
class ProceduralConfig:
    """Problems of the project's own, with step-by-step demonstrations; see data/procedural/.

    Args:
        family: Kind of problem.
        seed: Of the problems; the run's seed does not change them.
        count: Distinct problems.
        demonstrated: The first so many for training come with a demonstration; by default all.
        min_size: Smallest problem; what a size counts (terms, digits, numbers) is the family's, see
            docs/problems.md.
        max_size: Largest problem.
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
        seed: Of the problems.
        count: Distinct problems.
        options: Of the generator; what it has is in reasoning-gym's GALLERY.md.
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
        subset: Its configuration, where it has several.
        split: Of its rows.
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
        answer_from: Where the gold answer stands in its column, or in the demonstration of a row
            that has no such column: all of it, in the last \\boxed{}, or after the last ####.
        shuffle_options: Shuffle the options of multiple-choice questions, each by its own text.
        instruction: Put after every prompt, on a line of its own.
        kind: The verifier of rows that name none.
        distinct: Leave out rows whose prompt has come before.
        limit: Only the first so many rows.
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
        train: Training rows, of one source; excludes `mixture`.
        mixture: Training rows of several sources, drawn by their weights.
        evaluation: Evaluation sets by name, e.g. {held_out: {files: held_out.jsonl}}; the metrics
            of a set are called eval/<name>/... A set that is null is left out.
        system_prompt: Put before every prompt that has no system turn of its own.
        overlap: What becomes of training rows whose prompt is evaluated: an error, or dropped, so
            that fewer rows of their source are used.
        too_long: What becomes of rows whose prompt or demonstration exceeds its limit of tokens: an
            error, or dropped and counted.
        prompts_per_step: Distinct prompts of one rollout batch, P.
        max_prompt_tokens: Longest prompt.
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
