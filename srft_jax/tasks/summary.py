"""What a run says in plain text: its batch arithmetic at the start, before and after at the end."""

from srft_jax.report.terminal import table
from srft_jax.report.writers import read_metrics
from srft_jax.tasks.setup import Setup


def batch_arithmetic(setup: Setup, num_params: int) -> str:
    """The question asked most often of any trainer: how large is a step?"""
    config, sets = setup.config, setup.sets
    completions = config.rollout.completions_per_prompt if setup.objective.uses_rollouts else 0
    demonstrated = sum(bool(example.demonstrations) for example in sets.train)
    updates = config.training.updates_per_rollout
    most_tokens = setup.sequences_per_update * updates * setup.longest_sequence
    capacity = config.training.rows_per_microbatch * config.training.row_length
    rows = [
        ["parameters", f"{num_params:,}"],
        ["objective", config.objective.preset],
        ["training prompts", f"{len(sets.train):,}, {demonstrated:,} with a demonstration"],
        ["prompts per step", f"{config.data.prompts_per_step}"],
        ["completions per prompt", f"{completions}"],
        ["completions per step", f"{completions * config.data.prompts_per_step}"],
        [
            "demonstrations per prompt",
            f"{int(setup.objective.uses_demonstrations)} where there is one",
        ],
        ["optimizer steps per rollout", f"{updates}"],
        ["tokens per step, at most", f"{most_tokens:,}"],
        ["microbatches per update, at most", f"{setup.num_microbatches} of {capacity:,} tokens"],
        ["steps", f"{config.training.num_steps:,}"],
        ["devices", " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())],
    ]
    return table(["batch arithmetic", ""], rows)


def before_after(run_dir: str) -> str:
    """pass@1 of each set at the first and the last evaluation of the run."""
    evaluations = [
        line for line in read_metrics(run_dir) if any(k.startswith("eval/") for k in line)
    ]
    if not evaluations:
        return "no evaluation"
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name in sorted(key for key in last if key.endswith("/pass@1")):
        change = 100 * (last[name] - first[name])
        rows.append(
            [name.split("/")[1], f"{first[name]:.1%}", f"{last[name]:.1%}", f"{change:+.1f} points"]
        )
    return table(["pass@1", f"step {first['step']}", f"step {last['step']}", "change"], rows)
