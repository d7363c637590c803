"""What a run opens before its first step: data, sampler, step functions, records, the state."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import TrainState
from srft_jax.config import RunConfig, to_yaml
from srft_jax.data.encoding import EncodedExample
from srft_jax.experience.batches import BatchPlan
from srft_jax.experience.collect import GroupPlan, Sources
from srft_jax.experience.demonstrations import (
    all_demonstrations,
    describe_demonstrations,
    verified,
)
from srft_jax.experience.scoring import Scorer
from srft_jax.experience.streams import Streams, check_same_everywhere, digests
from srft_jax.host.compilations import Compilations
from srft_jax.host.profiler import Profiler
from srft_jax.mesh import gathered
from srft_jax.models import lora
from srft_jax.objectives.stages import Stage, Stages
from srft_jax.report import summary
from srft_jax.report.records import Recorder
from srft_jax.report.terminal import ProgressLine
from srft_jax.report.verdict_watch import VerdictWatch
from srft_jax.report.writers import RunWriter
from srft_jax.rewards import RewardPool
from srft_jax.rollout import Sampler
from srft_jax.setup.prepare import Setup, reward_pool
from srft_jax.tasks.planned import forward_options
from srft_jax.tasks.resume import fresh_or_resumed, open_run_dir
from srft_jax.training import updates
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_frozen, load_reference
from srft_jax.training.microbatch import FixedParams
from srft_jax.training.optimizer import make_optimizers
from srft_jax.training.run_export import keep_model_files


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Where the experience of every step comes from."""

    sampler: Sampler
    scorer: Scorer
    sources: Sources
    plan: GroupPlan


@dataclasses.dataclass(frozen=True)
class Updates:
    """How every step trains on its experience.

    Attributes:
        stages: Objectives of the run.
        functions: Compiled functions of each stage.
        learning_rates: Schedule of each optimizer.
        plan: How sequences become batches.
        fixed: Parameters that no step changes: frozen ones, and the reference's.
        mesh: Devices.
    """

    stages: Stages
    functions: dict[Stage, updates.StageFunctions]
    learning_rates: Mapping[str, optax.Schedule]
    plan: BatchPlan
    fixed: FixedParams
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """What the policy is scored on, and how: see `evaluation.scores.evaluate`."""

    sets: Mapping[str, Sequence[EncodedExample]]
    scorer: Scorer
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    max_new_tokens: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Records:
    """What a run leaves behind, and where it shows how far it is."""

    writer: RunWriter
    progress: ProgressLine
    recorder: Recorder
    watch: VerdictWatch
    profiler: Profiler
    compilations: Compilations


def begin(
    setup: Setup, rows_line: str, checkpoints: Checkpoints, stack: contextlib.ExitStack
) -> tuple[Rollouts, Updates, Evaluations, Records, TrainState, int]:
    """Open what stays open, make or restore the state, and say what the run starts from.

    Args:
        setup: The run.
        rows_line: How `training.rows_per_microbatch` was found, see `with_rows`.
        checkpoints: Checkpoints of the run directory.
        stack: What is opened is entered here.

    Returns:
        What steps are made with, the state, and the step that the run goes on from, 0 if it is new.
    """
    config, mesh = setup.config, setup.mesh
    pool = stack.enter_context(reward_pool(setup.data, setup.config.rewards))
    stack.enter_context(jax.set_mesh(mesh))
    compilations = stack.enter_context(Compilations())
    keep_model_files(config, setup.model_config, setup.tokenizer)
    check_same_everywhere(gathered(digests(setup.data.texts)))
    streams = _streams(setup)
    optimizers = make_optimizers(config.training, setup.stages, setup.model_config)
    state, start = fresh_or_resumed(
        config, setup.model_config, mesh, optimizers.transformations, checkpoints, streams
    )
    # With LoRA; no checkpoint holds it.
    frozen = load_frozen(config.model, setup.model_config, mesh, config.seed)
    open_run_dir(config, start)
    records = _open_records(config, compilations, stack)
    progress = records.progress
    progress.message(to_yaml(config))
    if rows_line:
        progress.message(rows_line)
    progress.message(
        summary.batch_arithmetic(
            config, setup.data, setup.stages, setup.tokenizer, mesh, frozen, state.params
        )
    )
    if start == config.training.num_steps:
        progress.message(f"already at step {start} of {start}: nothing to train")
    elif start:
        progress.message(f"continues after step {start} of {config.training.num_steps}")
    rollouts = _open_rollouts(setup, pool, streams, progress)
    rollouts.sampler.update(lora.whole(frozen, state.params), int(state.step))
    reference = load_reference(config.model, setup.objective, frozen, mesh)
    updating = Updates(
        stages=setup.stages,
        functions={
            stage: updates.make_stage_functions(
                stage, forward_options(setup), optimizers.transformations[stage.optimizer]
            )
            for stage in setup.stages.all
        },
        learning_rates=optimizers.learning_rates,
        plan=BatchPlan(
            config.training,
            longest_sequence=setup.config.longest_sequence,
            length_cap=config.rollout.max_new_tokens,
        ),
        fixed=FixedParams(frozen, reference),
        mesh=mesh,
    )
    evaluations = Evaluations(
        setup.data.evaluation,
        dataclasses.replace(rollouts.scorer, shaping=()),
        stop_ids=setup.tokenizer.stop_ids,
        stop_strings=tuple(config.rollout.stop_strings),
        max_new_tokens=config.evaluation.max_new_tokens,
        slots=config.evaluation.slots,
    )
    return rollouts, updating, evaluations, records, state, start


def _streams(setup: Setup) -> Streams:
    data = setup.config.data
    return Streams(
        setup.data.texts["train"],
        setup.objective,
        prompts_per_step=data.prompts_per_step,
        weights=[source.weight for source in data.mixture] or [1.0],
        seed=setup.config.seed,
    )


def _open_rollouts(
    setup: Setup, pool: RewardPool, streams: Streams, progress: ProgressLine
) -> Rollouts:
    """The sampler, and demonstrations with their verdicts where rewards are used."""
    config, train = setup.config, setup.data.train
    scorer = Scorer(pool, setup.tokenizer, config.rewards.shaping, config.rewards.correct_threshold)
    demonstrations = all_demonstrations(train)
    if setup.objective.uses_rollouts and setup.objective.uses_demonstrations:
        demonstrations = verified(demonstrations, train, scorer)
        for line in describe_demonstrations(demonstrations, train):
            progress.message(line)
    return Rollouts(
        Sampler(setup.model_config, setup.sampling, setup.mesh, tokenizer=setup.tokenizer),
        scorer,
        Sources(train, demonstrations, streams),
        GroupPlan(
            config.data.prompts_per_step,
            config.rollout.completions_per_prompt,
            stop_ids=setup.tokenizer.stop_ids,
            stop_strings=tuple(config.rollout.stop_strings),
            seed=config.seed,
        ),
    )


def _open_records(
    config: RunConfig, compilations: Compilations, stack: contextlib.ExitStack
) -> Records:
    writer = stack.enter_context(RunWriter(config.run_dir))
    progress = stack.enter_context(ProgressLine(config.training.num_steps))
    profiler = Profiler(f"{config.run_dir}/profile", config.training.profile_steps)
    return Records(
        writer=writer,
        progress=progress,
        recorder=Recorder(
            writer,
            progress,
            run_dir=config.run_dir,
            max_skipped=config.training.max_skipped,
            report=config.report,
        ),
        watch=VerdictWatch(),
        profiler=stack.enter_context(profiler),
        compilations=compilations,
    )
