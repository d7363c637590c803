"""The training loop: the only one, for every objective.

prompts -> groups (rollout, rewards) -> sequences -> packed batches -> train_step -> metrics
"""

import contextlib
import time
from collections.abc import Sequence

import jax

from srft_jax.batch import TrainState
from srft_jax.config import RunConfig
from srft_jax.config.stored_config import check_same_run
from srft_jax.evaluation.scores import measure_pass_at_1
from srft_jax.experience.batches import Update, pack_updates, plan_updates
from srft_jax.experience.collect import collect
from srft_jax.experience.groups import Experience
from srft_jax.experience.metrics import mix_metric, rollout_metrics, sample_rows
from srft_jax.host.compilations import compilation_lines
from srft_jax.host.stop_requests import stop_requests
from srft_jax.mesh import largest_of_processes
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stage
from srft_jax.report import summary
from srft_jax.report.page import write_report
from srft_jax.report.records import Diverged, StepRecord
from srft_jax.report.writers import read_metrics
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.begin import Records, Run, begin, update_sampler
from srft_jax.tasks.planned import with_rows
from srft_jax.training import updates
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.run_export import write_export


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
        run, state = begin(setup, checkpoints, stack)
        records = run.records
        if rows_line:
            records.progress.message(rows_line)
        if run.start == 0:
            records.progress.message("evaluating before the first step; the sampler compiles first")
        if _evaluation_due(config, run.start) and not _was_evaluated(config.run_dir, run.start):
            _evaluate(run, run.start)
        is_saved = run.start > 0  # whether a checkpoint has the state at hand
        for step in range(run.start + 1, training.num_steps + 1):
            # A signal came during the step before, or during an evaluation.
            if stop_requested():
                if not is_saved:
                    _save(run, checkpoints, step - 1, state)
                checkpoints.wait()
                records.progress.message(
                    f"stopped after step {step - 1} and saved; continue with\n"
                    f"  python run.py --config {config.run_dir}/config.yaml"
                )
                return 130
            state, record = _step(run, state, step)
            try:
                records.recorder.add(record)
            except Diverged:  # the state is the last sound one
                _save(run, checkpoints, step, state)
                checkpoints.wait()
                raise

            last = step == training.num_steps
            is_saved = last or _due(step, training.checkpoint_every)
            if is_saved:
                _save(run, checkpoints, step, state)
            # The evaluation comes after the save and is left out on a stop: a preempted machine is
            # gone before a long one ends. A continued run makes up for a missing one.
            if _evaluation_due(config, step) and (last or not stop_requested()):
                records.recorder.flush()
                _evaluate(run, step)
        run.rollouts.sampler.release()  # the export needs its memory
    _finish(config, lora.whole(run.learner.fixed.frozen, state.params))
    return 0


def _save(run: Run, checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    """Save the run as it is after a step."""
    # Resume cuts metrics back to the checkpoint's step, so they are written first.
    run.records.recorder.flush()
    checkpoints.save(step, state, run.rollouts.sources.streams.state())


def _step(run: Run, state: TrainState, step: int) -> tuple[TrainState, StepRecord]:
    """Rollouts, then updates on them; `state` is donated."""
    learner, records, sampler = run.learner, run.records, run.rollouts.sampler
    records.profiler.begin(step)
    began, stage = time.monotonic(), learner.stages.at(step)
    experience = _roll_out(run, stage, step)
    # `apply` donates the parameters, which the sampler shares where shardings agree: it lets go of
    # them first, with its memory, and has those of the new state afterwards.
    sampler.release()
    rolled_out = time.monotonic()
    for warning in records.watch.warnings(step, experience.sampled):
        records.progress.message(warning)
    planned = plan_updates(
        experience.groups, run.rollouts.sources, learner.options, learner.stages, step
    )
    step_updates = pack_updates(planned, learner.options, version=int(state.step))
    values = rollout_metrics(experience, stage.objective, length_cap=learner.options.length_cap)
    values |= mix_metric(stage, step)
    values |= updates.update_metrics(step_updates, state, learner.learning_rates)
    state, metrics = updates.apply(
        learner.functions,
        state,
        step_updates,
        learner.mesh,
        fixed=learner.fixed,
        measure_norms=_due(step, run.training.gradient_norms_every),
    )
    records.recorder.flush()  # the previous step's records, while the device computes this one
    jax.block_until_ready(state)
    update_sampler(sampler, learner.fixed.frozen, state)
    records.profiler.end()
    values |= _timing(began, rolled_out, step_updates)
    values |= _compiled(records, f"step {step}", expected=step == run.start + 1)
    samples = sample_rows(experience.groups)
    return state, StepRecord(step, metrics, values, samples, step_updates)


def _roll_out(run: Run, stage: Stage, step: int) -> Experience:
    """Groups of the step, verified."""
    rollouts, num_steps = run.rollouts, run.training.num_steps
    observer = summary.rollout_observer(run.records.progress, f"step {step}/{num_steps}, rollout")
    return collect(
        rollouts.sampler, rollouts.scorer, rollouts.sources, rollouts.options, stage, step, observer
    )


def _compiled(records: Records, where: str, *, expected: bool) -> dict[str, float]:
    """Print what has compiled since the last call; return the metrics.

    Programs have a line each where they are expected, at first use, and one line together later.
    """
    metrics, programs = records.compilations.since_last()
    if programs and expected:
        records.progress.message("\n".join(compilation_lines(programs)))
    elif programs:
        records.progress.message(f"{where} compiled {', '.join(map(str, programs))}")
    return metrics


def _evaluation_due(config: RunConfig, step: int) -> bool:
    """Whether the policy is evaluated after a step: always before the first and after the last."""
    return step in (0, config.training.num_steps) or _due(step, config.evaluation.every)


def _was_evaluated(run_dir: str, step: int) -> bool:
    """Whether metrics.jsonl holds the evaluation of a step, as process 0 reads it."""
    here = jax.process_index() == 0 and any(
        row["step"] == step and "time/evaluation" in row for row in read_metrics(run_dir)
    )
    return bool(largest_of_processes(here)[0])


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


def _evaluate(run: Run, step: int) -> None:
    """Score the policy on the evaluation sets; the verdicts go among the samples."""
    began, records = time.monotonic(), run.records
    observer = summary.rollout_observer(records.progress, f"step {step}, evaluation")
    values, rows = measure_pass_at_1(run.rollouts.sampler, run.evaluations, observer)
    # Or the next step would count what the evaluation compiles.
    _compiled(records, f"step {step}, evaluation,", expected=step == run.start)
    records.writer.metrics(step, values | {"time/evaluation": time.monotonic() - began})
    records.writer.samples([{"step": step} | row for row in rows])
    records.progress.message(f"step {step}: {summary.scores_line(values)}")


def _finish(config: RunConfig, params: Params) -> None:
    """Export, write the report, and say where everything is."""
    export = write_export(config, params)
    if jax.process_index() != 0:
        return
    report = write_report(config.run_dir)
    print(summary.before_after(config.run_dir))
    print(f"model    {export}\nreport   {report}\nmetrics  {config.run_dir}/metrics.jsonl")
