"""What a run says in plain text: batch arithmetic, how far a rollout is, before and after.

Batch arithmetic answers the question asked most often of any trainer: how large is a step? Each
function that ends in `_rows` gives some lines of its table, as pairs of a name and a value.
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from srft_jax.config import Objective, TrainingConfig
from srft_jax.data.encoding import EncodedSets
from srft_jax.models.decoder import Params, num_params
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.objectives.stages import Stage, Stages
from srft_jax.report.terminal import ProgressLine, table
from srft_jax.report.writers import read_metrics
from srft_jax.rollout import Observer, RolloutProgress

TableRows = list[list[str]]


def batch_arithmetic(*parts: TableRows) -> str:
    """Return the table of what a step is made of, from the lines of its parts."""
    return table(["batch arithmetic", ""], [row for part in parts for row in part])


def data_rows(sets: EncodedSets) -> TableRows:
    """Say what was read from each source, how many prompts are trained on, what was too long."""
    demonstrated = sum(bool(problem.demonstrations) for problem in sets.train)
    return [
        *([rows.source, f"{rows.read:,} rows read, {rows.used:,} used"] for rows in sets.rows),
        ["training prompts", f"{len(sets.train):,}, {demonstrated:,} with a demonstration"],
        *(
            [
                f"  too long, dropped from {name}",
                f"{lost.prompts:,} prompts, and of the others {lost.demonstrations:,} "
                f"demonstrations, which leaves {lost.bare:,} without one",
            ]
            for name, lost in sets.dropped.items()
            if lost.prompts or lost.demonstrations
        ),
    ]


def policy_rows(frozen: Params, trained: Params, tokenizer: Tokenizer) -> TableRows:
    """Say how many parameters there are, and which tokens end a completion.

    In: a tokenizer with two stop ids.  Out: ..., completions end with <|im_end|> (trained),
    <|endoftext|>.

    Args:
        frozen: With LoRA, all parameters but the adapters, or their shapes; otherwise none.
        trained: Parameters that training changes, or their shapes.
        tokenizer: Tokenizer of the policy.
    """
    first, *others = (tokenizer.spell([id]) for id in tokenizer.stop_ids)
    return [
        ["parameters", f"{num_params(frozen) + num_params(trained):,}"],
        *([["  trained, of adapters", f"{num_params(trained):,}"]] if frozen else []),
        ["completions end with", ", ".join([f"{first} (trained)", *others])],
    ]


def rollout_rows(
    objective: Objective, *, prompts_per_step: int, completions_per_prompt: int
) -> TableRows:
    """Say how many prompts, completions and demonstrations one step has."""
    group_size = completions_per_prompt if objective.uses_rollouts else 0
    completions = group_size * prompts_per_step
    rows = [
        ["prompts per step", f"{prompts_per_step}"],
        ["completions per prompt", f"{group_size}"],
        ["completions per step", f"{completions}"],
    ]
    if objective.prefix != "none":
        prefixed = group_size if objective.prefix == "all" else 1
        rows.append(
            ["  that start with a part of it", f"{prefixed} where there is a demonstration"]
        )
    if objective.drop_zero_std:
        rows.append(["  with refills, at most", f"{completions * (1 + objective.max_refills)}"])
    return [*rows, _demonstration_row(objective)]


def _demonstration_row(objective: Objective) -> list[str]:
    if objective.demo_source == "own":
        return ["demonstrations per step", f"{objective.demo_per_step}"]
    if not objective.trains_demonstrations:
        return ["demonstrations per prompt", "0"]
    condition = "there is one"
    if objective.gate != "none":
        condition += f" and at most {objective.gate_solved} completions are correct"
    return ["demonstrations per prompt", f"1 where {condition}"]


def update_rows(stages: Stages, training: TrainingConfig, longest_sequence: int) -> TableRows:
    """Say how many updates and steps there are, and how large an update of each stage is.

    Args:
        stages: Stages of the run.
        training: Numbers of steps and updates, and the shape of a microbatch.
        longest_sequence: Input tokens of the longest prompt and completion.
    """
    sft_steps = stages.policy.steps_before
    headings = {
        "sft": ["first stage", f"{sft_steps} steps, each prompt with its demonstration"],
        "policy": ["policy", f"{training.num_steps - sft_steps} steps"],
        "buffered": [
            "buffered demonstrations",
            f"an update on {stages.buffered.sequences_per_update if stages.buffered else 0}",
        ],
    }
    rows = [["updates per rollout", f"{training.updates_per_rollout}"]]
    for stage in stages.all:
        sizes = _update_size(stage, training, longest_sequence)
        if len(stages.all) > 1:
            rows.append(headings[stage.name])
            sizes = [[f"  {name}", value] for name, value in sizes]
        rows += sizes
    return [*rows, ["steps", f"{training.num_steps:,}"]]


def _update_size(stage: Stage, training: TrainingConfig, longest_sequence: int) -> TableRows:
    """Tokens and microbatches; the tokens of a step's updates together, but for buffered ones."""
    is_buffered = stage.name == "buffered"
    num_updates = 1 if is_buffered else training.updates_per_rollout
    most_tokens = stage.sequences_per_update * num_updates * longest_sequence
    num_microbatches = stage.num_microbatches(longest_sequence, training)
    capacity = training.rows * training.row_length
    return [
        [f"tokens per {'update' if is_buffered else 'step'}, at most", f"{most_tokens:,}"],
        ["microbatches per update, at most", f"{num_microbatches} of {capacity:,} tokens"],
    ]


def device_rows(mesh: Mesh) -> TableRows:
    """Say how many devices each mesh axis has."""
    return [["devices", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())]]


def rollout_observer(line: ProgressLine, what: str) -> Observer:
    """Return an observer that shows on the line how far a rollout is, if it takes long."""

    def show(now: RolloutProgress) -> None:
        rate = now.tokens / now.seconds if now.seconds else 0.0
        fields = [
            what,
            f"{now.finished:,}/{now.total:,} completions",
            f"{rate:,.0f} tokens/s",
            f"occupancy {now.occupancy:.0%}",
        ]
        line.interim(fields, now.seconds)

    return show


def scores_table(values: Mapping[str, float], num_problems: Mapping[str, int]) -> str:
    """Return a table of pass@1 and mean length of each set.

    Args:
        values: Metrics of an evaluation, `eval/<set>/...`.
        num_problems: Problems of each set; sets without any are left out.
    """
    rows = [
        [
            name,
            str(count),
            f"{values[f'eval/{name}/pass@1']:.1%}",
            f"{values[f'eval/{name}/length']:.1f}",
        ]
        for name, count in num_problems.items()
        if count
    ]
    return table(["set", "problems", "pass@1", "mean length"], rows)


def scores_line(values: Mapping[str, float]) -> str:
    """In: {"eval/held_out/pass@1": 0.5, ...}.  Out: "pass@1 held_out 50.0%"."""
    scores = [
        f"{key.split('/')[1]} {value:.1%}" for key, value in values.items() if "pass@1" in key
    ]
    return "pass@1 " + ", ".join(scores)


def before_after(run_dir: str) -> str:
    """Return a table of each set's pass@1 at the first and the last evaluation of the run."""
    evaluations = [
        line for line in read_metrics(run_dir) if any(name.startswith("eval/") for name in line)
    ]
    if not evaluations:
        return "no evaluation"
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name in sorted(name for name in last if name.endswith("/pass@1")):
        change = 100 * (last[name] - first[name])
        rows.append(
            [name.split("/")[1], f"{first[name]:.1%}", f"{last[name]:.1%}", f"{change:+.1f} points"]
        )
    return table(["pass@1", f"step {first['step']}", f"step {last['step']}", "change"], rows)
