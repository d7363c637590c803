"""What a run opens before its first step: data, sampler, step functions, records, the state."""

import contextlib
import dataclasses
from collections.abc import Mapping

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import TrainState
from srft_jax.config import RunConfig, TrainingConfig, to_yaml
from srft_jax.evaluation.scores import Evaluations
from srft_jax.experience.batches import BatchOptions
from srft_jax.experience.collect import GroupOptions, Sources
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
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stage, Stages
from srft_jax.report.records import Recorder
from srft_jax.report.terminal import ProgressLine
from srft_jax.report.verdict_watch import VerdictWatch
from srft_jax.report.writers import RunWriter
from srft_jax.rewards import RewardPool
from srft_jax.rollout import Sampler
from srft_jax.setup.prepare import Setup, reward_pool
from srft_jax.tasks.planned import forward_options, step_arithmetic
from srft_jax.tasks.resume import fresh_or_resumed, open_run_dir
from srft_jax.training import updates
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_frozen, load_reference
from srft_jax.training.microbatch import FixedParams
from srft_jax.training.optimizer import Optimizers, make_optimizers
from srft_jax.training.run_export import keep_model_files


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Where the experience of every step comes from."""

    sampler: Sampler
    scorer: Scorer
    sources: Sources
    options: GroupOptions


@dataclasses.dataclass(frozen=True)
class Learner:
    """How every step trains on its experience.

    Attributes:
        stages: Objectives of the run.
        functions: Compiled functions of each stage.
        learning_rates: Schedule of each optimizer.
        options: How sequences become batches.
        fixed: Parameters that no step changes: frozen ones, and the reference's.
        mesh: Devices.
    """

    stages: Stages
    functions: dict[Stage, updates.StageFunctions]
    learning_rates: Mapping[str, optax.Schedule]
    options: BatchOptions
    fixed: FixedParams
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Records:
    """What a run leaves behind, and where it shows how far it is."""

    writer: RunWriter
    progress: ProgressLine
    recorder: Recorder
    watch: VerdictWatch
    profiler: Profiler
    compilations: Compilations


@dataclasses.dataclass(frozen=True)
class Run:
    """What every step of a run is made with.

    Attributes:
        training: Section of the configuration, its rows per microbatch chosen.
        rollouts: Where experience comes from.
        learner: How it is trained on.
        evaluations: What the policy is scored on.
        records: What the run leaves behind.
        start: Step that the run goes on from; 0 if it is new.
    """

    training: TrainingConfig
    rollouts: Rollouts
    learner: Learner
    evaluations: Evaluations
    records: Records
    start: int


def begin(
    setup: Setup, checkpoints: Checkpoints, stack: contextlib.ExitStack
) -> tuple[Run, TrainState]:
    """Open what stays open, make or restore the state, and say what the run starts from.

    Args:
        setup: The run, its rows per microbatch chosen.
        checkpoints: Checkpoints of the run directory.
        stack: What is opened is entered here.

    Returns:
        What steps are made with, and the state before the first one.
    """
    config, model_config, mesh = setup.config, setup.model_config, setup.mesh
    pool = stack.enter_context(reward_pool(setup.data, config.rewards))
    stack.enter_context(jax.set_mesh(mesh))
    compilations = stack.enter_context(Compilations())
    keep_model_files(config, model_config, setup.tokenizer)
    check_same_everywhere(gathered(digests(setup.data.texts)))
    streams = _streams(setup)
    optimizers = make_optimizers(config.training, setup.stages, model_config)
    state, start = fresh_or_resumed(
        config, model_config, mesh, optimizers.transformations, checkpoints, streams
    )
    frozen = load_frozen(config.model, model_config, mesh, config.seed)  # no checkpoint holds them
    # After the state: a run that cannot be continued keeps its records as they are.
    open_run_dir(config, start)
    records = _open_records(config, compilations, stack)
    _announce(records.progress, setup, frozen, state, start)
    # The sampler shares the state's parameters. Its cache takes what memory is left by then, as it
    # is made at the first rollout.
    rollouts = _open_rollouts(setup, pool, streams, records.progress)
    update_sampler(rollouts.sampler, frozen, state)
    learner = _make_learner(setup, optimizers, frozen)
    evaluations = make_evaluations(setup, rollouts.scorer)
    return Run(config.training, rollouts, learner, evaluations, records, start), state


def update_sampler(sampler: Sampler, frozen: Params, state: TrainState) -> None:
    """Let the sampler draw from the policy of this state."""
    sampler.update(lora.whole(frozen, state.params), int(state.step))


def make_scorer(setup: Setup, pool: RewardPool) -> Scorer:
    """Return how the run scores answers."""
    rewards = setup.config.rewards
    return Scorer(pool, setup.tokenizer, rewards.shaping, rewards.correct_threshold)


def make_evaluations(setup: Setup, scorer: Scorer) -> Evaluations:
    """Return what the policy is scored on, and how."""
    return Evaluations(
        setup.data.evaluation,
        scorer,
        stop_ids=setup.tokenizer.stop_ids,
        stop_strings=tuple(setup.config.rollout.stop_strings),
        max_new_tokens=setup.config.evaluation.max_new_tokens,
        slots=setup.config.evaluation.slots,
    )


def _announce(
    progress: ProgressLine, setup: Setup, frozen: Params, state: TrainState, start: int
) -> None:
    """Show the configuration, how large a step is, and where the run goes on."""
    config = setup.config
    progress.message(to_yaml(config))
    progress.message(step_arithmetic(setup, frozen, state.params))
    if start == config.training.num_steps:
        progress.message(f"already at step {start} of {start}: nothing to train")
    elif start:
        progress.message(f"continues after step {start} of {config.training.num_steps}")


def _make_learner(setup: Setup, optimizers: Optimizers, frozen: Params) -> Learner:
    """Nothing compiles yet; the reference is loaded."""
    config, options = setup.config, forward_options(setup)
    reference = load_reference(config.model, setup.objective, frozen, setup.mesh)
    return Learner(
        stages=setup.stages,
        functions={
            stage: updates.make_stage_functions(
                stage, options, optimizers.transformations[stage.optimizer]
            )
            for stage in setup.stages.all
        },
        learning_rates=optimizers.learning_rates,
        options=BatchOptions(
            config.training,
            longest_sequence=config.longest_sequence,
            length_cap=config.rollout.max_new_tokens,
        ),
        fixed=FixedParams(frozen, reference),
        mesh=setup.mesh,
    )


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
    scorer = make_scorer(setup, pool)
    demonstrations = all_demonstrations(train)
    if setup.objective.uses_rollouts and setup.objective.uses_demonstrations:
        demonstrations = verified(demonstrations, train, scorer)
        for line in describe_demonstrations(demonstrations, train):
            progress.message(line)
    return Rollouts(
        Sampler(setup.model_config, setup.sampling, setup.mesh, tokenizer=setup.tokenizer),
        scorer,
        Sources(train, demonstrations, streams),
        GroupOptions(
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
