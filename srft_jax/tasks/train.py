"""The training loop: the only one, for every objective.

prompts -> groups (rollout, rewards) -> sequences -> packed batches -> train_step -> metrics
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import optax
from jax.sharding import Mesh

from srft_jax.batch import TrainState
from srft_jax.config import RunConfig, TrainingConfig, to_yaml
from srft_jax.data.encoding import EncodedExample
from srft_jax.evaluation.scores import evaluate
from srft_jax.experience.batches import BatchPlan, Update, make_updates
from srft_jax.experience.collect import GroupPlan, Sources, collect
from srft_jax.experience.demonstrations import (
    all_demonstrations,
    describe_demonstrations,
    verified,
)
from srft_jax.experience.metrics import mix_metric, rollout_metrics, sample_rows
from srft_jax.experience.scoring import Scorer
from srft_jax.experience.streams import Streams, check_same_everywhere, digests
from srft_jax.host.compilations import Compilations, compilation_lines
from srft_jax.host.profiler import Profiler
from srft_jax.host.stop_requests import stop_requests
from srft_jax.mesh import gathered
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stage, Stages
from srft_jax.report import summary
from srft_jax.report.page import write_report
from srft_jax.report.records import Diverged, Recorder, StepRecord
from srft_jax.report.terminal import ProgressLine
from srft_jax.report.verdict_watch import VerdictWatch
from srft_jax.report.writers import RunWriter
from srft_jax.rewards import RewardPool
from srft_jax.rollout import Sampler
from srft_jax.setup.prepare import Setup, prepare, reward_pool
from srft_jax.tasks.export import keep_model_files, write_export
from srft_jax.tasks.plan import with_rows
from srft_jax.tasks.resume import check_same_run, fresh_or_resumed, open_run_dir
from srft_jax.training import updates
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_frozen, load_reference
from srft_jax.training.optimizer import make_optimizers


@dataclasses.dataclass(frozen=True)
class _Rollouts:
    """Where the experience of every step comes from."""

    sampler: Sampler
    scorer: Scorer
    sources: Sources
    plan: GroupPlan


@dataclasses.dataclass(frozen=True)
class _Updates:
    """How every step trains on its experience.

    Attributes:
        stages: Objectives of the run.
        functions: Compiled functions of each stage.
        learning_rates: Schedule of each optimizer.
        plan: How sequences become batches.
        frozen: With LoRA, all parameters but the adapters, which the state holds.
        mesh: Devices.
    """

    stages: Stages
    functions: dict[Stage, updates.StageFunctions]
    learning_rates: Mapping[str, optax.Schedule]
    plan: BatchPlan
    frozen: Params
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class _Evaluations:
    """What the policy is scored on, and how: see `evaluation.scores.evaluate`."""

    sets: Mapping[str, Sequence[EncodedExample]]
    scorer: Scorer
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    max_new_tokens: int
    slots: int


@dataclasses.dataclass(frozen=True)
class _Records:
    """What a run leaves behind, and where it shows how far it is."""

    writer: RunWriter
    progress: ProgressLine
    recorder: Recorder
    watch: VerdictWatch
    profiler: Profiler
    compilations: Compilations


def train(config: RunConfig) -> int:
    """Train to `training.num_steps`, from the newest checkpoint of the run directory if any.

    Returns:
        Exit code: 0, or 130 where a signal stopped the run, which has then saved.
    """
    setup, rows_line = with_rows(prepare(config))
    config, training = setup.config, setup.config.training
    check_same_run(config)
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(stop_requests())
        checkpoints = stack.enter_context(Checkpoints(config.run_dir, training.keep_checkpoints))
        rollouts, updating, evaluations, records, state, start = _begin(
            setup, rows_line, checkpoints, stack
        )
        streams = rollouts.sources.streams
        if start == 0:
            records.progress.message("evaluating before the first step; the sampler compiles first")
            _evaluate(rollouts.sampler, evaluations, records, 0)
        for step in range(start + 1, training.num_steps + 1):
            state, record = _step(rollouts, updating, records, step, start, state, training)
            try:
                records.recorder.add(record)
            except Diverged:  # the state is the last sound one
                checkpoints.save(step, state, streams.state())
                checkpoints.wait()
                raise

            last, stopping = step == training.num_steps, stop_requested()
            if last or _due(step, config.evaluation.every):
                records.recorder.flush()
                _evaluate(rollouts.sampler, evaluations, records, step)
            if last or stopping or _due(step, training.checkpoint_every):
                # Resume cuts metrics back to the checkpoint's step, so they are written first.
                records.recorder.flush()
                checkpoints.save(step, state, streams.state())
            if stopping and not last:
                checkpoints.wait()
                records.progress.message(
                    f"stopped after step {step} and saved; continue with\n"
                    f"  python run.py --config {config.run_dir}/config.yaml"
                )
                return 130
    _finish(config, lora.whole(updating.frozen, state.params))
    return 0


def _begin(
    setup: Setup, rows_line: str, checkpoints: Checkpoints, stack: contextlib.ExitStack
) -> tuple[_Rollouts, _Updates, _Evaluations, _Records, TrainState, int]:
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
    optimizers = make_optimizers(
        config.training,
        setup.stages,
        prompts_per_step=config.data.prompts_per_step,
        model_config=setup.model_config,
    )
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
    progress.message(batch_arithmetic(setup, frozen, state.params))
    if start == config.training.num_steps:
        progress.message(f"already at step {start} of {start}: nothing to train")
    elif start:
        progress.message(f"continues after step {start} of {config.training.num_steps}")
    rollouts = _open_rollouts(setup, pool, streams, progress)
    rollouts.sampler.update(lora.whole(frozen, state.params), int(state.step))
    reference = load_reference(config.model, setup.objective, frozen, mesh)
    updating = _Updates(
        stages=setup.stages,
        functions={
            stage: updates.make_stage_functions(
                stage,
                setup.model_config,
                optimizers.transformations[stage.optimizer],
                temperature=config.rollout.temperature,
                runtime=setup.runtime,
                logits_mib=config.training.logits_mib,
                frozen_params=frozen,
                reference_params=reference,
            )
            for stage in setup.stages.all
        },
        learning_rates=optimizers.learning_rates,
        plan=BatchPlan(
            config.training,
            longest_sequence=setup.config.longest_sequence,
            length_cap=config.rollout.max_new_tokens,
            threshold=config.rewards.correct_threshold,
        ),
        frozen=frozen,
        mesh=mesh,
    )
    evaluations = _Evaluations(
        setup.data.evaluation,
        dataclasses.replace(rollouts.scorer, shaping=()),
        stop_ids=setup.tokenizer.stop_ids,
        stop_strings=tuple(config.rollout.stop_strings),
        max_new_tokens=config.evaluation.max_new_tokens,
        slots=config.evaluation.slots,
    )
    return rollouts, updating, evaluations, records, state, start


def batch_arithmetic(setup: Setup, frozen: Params, trained: Params) -> str:
    """Return the table of what a step is made of, for the parameters or their shapes."""
    config = setup.config
    return summary.arithmetic_table(
        summary.data_rows(setup.data),
        summary.policy_rows(frozen, trained, setup.tokenizer),
        [["objective", config.objective.preset]],
        summary.rollout_rows(
            setup.objective,
            prompts_per_step=config.data.prompts_per_step,
            completions_per_prompt=config.rollout.completions_per_prompt,
        ),
        summary.update_rows(setup.stages, config.training, setup.config.longest_sequence),
        summary.device_rows(setup.mesh),
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
) -> _Rollouts:
    """The sampler, and demonstrations with their verdicts where rewards are used."""
    config, train = setup.config, setup.data.train
    scorer = Scorer(pool, setup.tokenizer, config.rewards.shaping, config.rewards.correct_threshold)
    demonstrations = all_demonstrations(train)
    if setup.objective.uses_rollouts and setup.objective.uses_demonstrations:
        demonstrations = verified(demonstrations, train, scorer)
        for line in describe_demonstrations(demonstrations, train, scorer):
            progress.message(line)
    return _Rollouts(
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
) -> _Records:
    writer = stack.enter_context(RunWriter(config.run_dir))
    progress = stack.enter_context(ProgressLine(config.training.num_steps))
    profiler = Profiler(f"{config.run_dir}/profile", config.training.profile_steps)
    return _Records(
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


def _step(
    rollouts: _Rollouts,
    updating: _Updates,
    records: _Records,
    step: int,
    start: int,
    state: TrainState,
    training: TrainingConfig,
) -> tuple[TrainState, StepRecord]:
    """Rollouts, then updates on them; `state` is donated."""
    records.profiler.begin(step)
    began, stage = time.monotonic(), updating.stages.at(step)
    what = f"step {step}/{training.num_steps}, rollout"
    experience = collect(
        rollouts.sampler,
        rollouts.scorer,
        rollouts.sources,
        rollouts.plan,
        stage,
        step,
        summary.rollout_observer(records.progress, what),
    )
    rollouts.sampler.release()  # its memory is free for the updates, which donate the parameters
    rolled_out = time.monotonic()
    for warning in records.watch.warnings(step, experience.sampled):
        records.progress.message(warning)
    step_updates = make_updates(
        experience.groups,
        rollouts.sources,
        updating.plan,
        updating.stages,
        step,
        version=int(state.step),
    )
    values = rollout_metrics(
        experience,
        stage.objective,
        length_cap=updating.plan.length_cap,
        threshold=updating.plan.threshold,
    )
    values |= mix_metric(stage, step)
    values |= updates.update_metrics(step_updates, state, updating.learning_rates)
    state, metrics = updates.apply(
        updating.functions,
        state,
        step_updates,
        updating.mesh,
        measure_norms=_due(step, training.gradient_norms_every),
    )
    records.recorder.flush()  # the previous step's records, while the device computes this one
    jax.block_until_ready(state)
    rollouts.sampler.update(lora.whole(updating.frozen, state.params), int(state.step))
    records.profiler.end()
    values |= _timing(began, rolled_out, step_updates)
    values |= _compiled(records, f"step {step}", expected=step == start + 1)
    samples, batches = sample_rows(experience.groups), [update.batch for update in step_updates]
    return state, StepRecord(step, metrics, values, samples, batches)


def _compiled(records: _Records, where: str, *, expected: bool) -> dict[str, float]:
    """Print what has compiled since the last call; return the metrics.

    Programs have a line each where they are expected, at first use, and one line together later.
    """
    metrics, programs = records.compilations.since_last()
    if programs and expected:
        records.progress.message("\n".join(compilation_lines(programs)))
    elif programs:
        records.progress.message(f"{where} compiled {', '.join(map(str, programs))}")
    return metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _timing(began: float, rolled_out: float, step_updates: Sequence[Update]) -> dict[str, float]:
    now = time.monotonic()
    num_tokens = sum(int((update.batch.rows.segment_ids > 0).sum()) for update in step_updates)
    return {
        "time/step": now - began,
        "time/rollout": rolled_out - began,
        "time/train": now - rolled_out,
        "perf/tokens_per_second": num_tokens / (now - began),
    }


def _evaluate(sampler: Sampler, evaluations: _Evaluations, records: _Records, step: int) -> None:
    """Score the policy on the evaluation sets; the verdicts go among the samples."""
    began = time.monotonic()
    values, rows = evaluate(
        sampler,
        evaluations.sets,
        evaluations.scorer,
        stop_ids=evaluations.stop_ids,
        stop_strings=evaluations.stop_strings,
        max_new_tokens=evaluations.max_new_tokens,
        slots=evaluations.slots,
        observer=summary.rollout_observer(records.progress, f"step {step}, evaluation"),
    )
    # Or the next step would count what the evaluation compiles.
    _compiled(records, f"step {step}, evaluation,", expected=step == 0)
    records.writer.metrics(step, values | {"time/evaluation": time.monotonic() - began})
    records.writer.samples([{"step": step} | row for row in rows])
    scores = [
        f"{key.split('/')[1]} {value:.1%}" for key, value in values.items() if "pass@1" in key
    ]
    records.progress.message(f"step {step}: pass@1 " + ", ".join(scores))


def _finish(config: RunConfig, params: Params) -> None:
    """Export, write the report, and say where everything is."""
    export = write_export(config, params)
    if jax.process_index() != 0:
        return
    report = write_report(config.run_dir)
    print(summary.before_after(config.run_dir))
    print(f"model    {export}\nreport   {report}\nmetrics  {config.run_dir}/metrics.jsonl")
