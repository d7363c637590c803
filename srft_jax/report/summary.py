"""What a run says in plain text: batch arithmetic, how far a rollout is, before and after."""

from srft_jax.models.decoder import Params, num_params
from srft_jax.objectives.stages import Stage
from srft_jax.report.terminal import Progress, table
from srft_jax.report.writers import read_metrics
from srft_jax.rollout import Observer
from srft_jax.rollout import Progress as RolloutProgress
from srft_jax.setup.prepare import Setup


def batch_arithmetic(setup: Setup, frozen: Params, trained: Params) -> str:
    """The question asked most often of any trainer: how large is a step?"""
    config, sets = setup.config, setup.sets
    demonstrated = sum(bool(example.demonstrations) for example in sets.train)
    rows = [
        *([rows.source, f"{rows.read:,} rows read, {rows.used:,} used"] for rows in sets.rows),
        ["parameters", f"{num_params(frozen) + num_params(trained):,}"],
        *([["  trained, of adapters", f"{num_params(trained):,}"]] if frozen else []),
        ["objective", config.objective.preset],
        ["training prompts", f"{len(sets.train):,}, {demonstrated:,} with a demonstration"],
        *_dropped_rows(setup),
        ["completions end with", _stops(setup)],
        ["prompts per step", f"{config.data.prompts_per_step}"],
        *_rollout_rows(setup),
        *_demonstration_rows(setup),
        ["optimizer steps per rollout", f"{config.training.updates_per_rollout}"],
        *(row for stage in setup.stages.all for row in _stage_rows(setup, stage)),
        ["steps", f"{config.training.num_steps:,}"],
        ["devices", " x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())],
    ]
    return table(["batch arithmetic", ""], rows)


def _dropped_rows(setup: Setup) -> list[list[str]]:
    """Nothing where nothing was too long."""
    return [
        [
            f"  too long, dropped from {name}",
            f"{dropped.prompts:,} prompts, and of the others {dropped.demonstrations:,} "
            f"demonstrations, which leaves {dropped.bare:,} without one",
        ]
        for name, dropped in setup.dropped.items()
        if dropped.prompts or dropped.demonstrations
    ]


def _stops(setup: Setup) -> str:
    """In: a tokenizer with two.  Out: <|im_end|> (trained), <|endoftext|>."""
    first, *others = (setup.tokenizer.spell([id]) for id in setup.tokenizer.stop_ids)
    return ", ".join([f"{first} (trained)", *others])


def _rollout_rows(setup: Setup) -> list[list[str]]:
    objective = setup.objective
    size = setup.config.rollout.completions_per_prompt if objective.uses_rollouts else 0
    prompts = setup.config.data.prompts_per_step
    rows = [
        ["completions per prompt", f"{size}"],
        ["completions per step", f"{size * prompts}"],
    ]
    if objective.prefix != "none":
        prefixed = f"{size if objective.prefix == 'all' else 1} where there is a demonstration"
        rows.append(["  that start with a part of it", prefixed])
    if objective.drop_zero_std:
        most = size * prompts * (1 + objective.max_refills)
        rows.append(["  with refills, at most", f"{most}"])
    return rows


def _demonstration_rows(setup: Setup) -> list[list[str]]:
    objective = setup.objective
    if objective.demo_source == "own":
        return [["demonstrations per step", f"{objective.demo_per_step}"]]
    passing = "there is one"
    if objective.gate != "none":
        passing += f" and at most {objective.gate_solved} completions are correct"
    given = int(objective.trains_demonstrations)
    return [["demonstrations per prompt", f"{given} where {passing}" if given else "0"]]


def _stage_rows(setup: Setup, stage: Stage) -> list[list[str]]:
    """How large an update is, and all that a rollout has."""
    training, buffered = setup.config.training, stage.name == "buffered"
    updates = 1 if buffered else training.updates_per_rollout
    most_tokens = stage.sequences_per_update * updates * setup.longest_sequence
    capacity = training.rows * training.row_length
    microbatches = f"{setup.num_microbatches(stage)} of {capacity:,} tokens"
    rows = [
        [f"tokens per {'update' if buffered else 'step'}, at most", f"{most_tokens:,}"],
        ["microbatches per update, at most", microbatches],
    ]
    if len(setup.stages.all) == 1:
        return rows
    sft_steps = setup.objective.sft_steps
    heading = {
        "sft": ["first stage", f"{sft_steps} steps, each prompt with its demonstration"],
        "policy": ["policy", f"{training.num_steps - sft_steps} steps"],
        "buffered": ["buffered demonstrations", f"an update on {stage.sequences_per_update}"],
    }
    return [heading[stage.name], *([f"  {name}", value] for name, value in rows)]


def rollout_observer(progress: Progress, what: str) -> Observer:
    """Shows on the progress line how far a rollout is, if it takes long."""

    def show(now: RolloutProgress) -> None:
        rate = now.tokens / now.seconds if now.seconds else 0.0
        fields = [
            what,
            f"{now.finished:,}/{now.total:,} completions",
            f"{rate:,.0f} tokens/s",
            f"occupancy {now.occupancy:.0%}",
        ]
        progress.interim(fields, now.seconds)

    return show


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
