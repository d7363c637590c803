"""The training loop: the only one, for every objective.

prompts -> groups (rollout, rewards) -> sequences -> packed batches -> train_step -> metrics
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import optax

from srft_jax.batch import TrainState
from srft_jax.config import RunConfig, to_yaml
from srft_jax.evaluation.scores import evaluate
from srft_jax.experience import rollouts
from srft_jax.experience.batches import Update, make_updates
from srft_jax.experience.metrics import mix_metric, rollout_metrics, sample_rows
from srft_jax.experience.streams import Streams
from srft_jax.host.compilations import Compilations, compilation_lines
from srft_jax.host.profiler import Profiler
from srft_jax.host.stop_requests import stop_requests
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.objectives.stages import Stage
from srft_jax.planning.microbatch_size import with_rows
from srft_jax.report import summary
from srft_jax.report.page import write_report
from srft_jax.report.records import Diverged, Recorder, StepRecord
from srft_jax.report.terminal import ProgressLine
from srft_jax.report.verdict_watch import VerdictWatch
from srft_jax.report.writers import RunWriter
from srft_jax.rewards import RewardPool
from srft_jax.setup.prepare import Setup, prepare, reward_pool
from srft_jax.tasks.export import keep_model_files, write_export
from srft_jax.tasks.resume import check_same_run, fresh_or_resumed, open_run_dir
from srft_jax.training import updates
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.loading import load_frozen, load_reference
from srft_jax.training.optimizer import make_optimizers


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all steps of a run have in common.

    Attributes:
        setup: Configuration, data, architecture, mesh.
        start: Step that the run goes on from; 0 for a new one.
        frozen: With LoRA, all parameters but the adapters, which the state holds.
        functions: Compiled functions, by stage.
        learning_rates: Schedule of each optimizer, by name.
        streams: Where prompts and demonstrations come from, as far as they are used up.
        demonstrations: Verdicts on them.
        pool: Verifiers.
        writer: Of metrics and samples.
        progress: The terminal.
        recorder: Of steps; uses the two above.
        watch: Warns of verdicts.
        profiler: Traces chosen steps.
        compilations: Counts them.
    """

    setup: Setup
    start: int
    frozen: Params
    functions: dict[Stage, updates.StageFunctions]
    learning_rates: Mapping[str, optax.Schedule]
    streams: Streams
    demonstrations: rollouts.ScoredDemonstrations
    pool: RewardPool
    writer: RunWriter
    progress: ProgressLine
    recorder: Recorder
    watch: VerdictWatch
    profiler: Profiler
    compilations: Compilations

    def policy(self, state: TrainState) -> Params:
        return lora.whole(self.frozen, state.params)


def train(config: RunConfig) -> int:
    """Trains to `training.num_steps`, from the newest checkpoint of the run directory if any.

    Returns:
        Exit code: 0, or 130 where a signal stopped the run, which has then saved.
    """
    setup, chosen = with_rows(prepare(config))
    config, training = setup.config, setup.config.training
    check_same_run(config)
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(stop_requests())
        checkpoints = stack.enter_context(Checkpoints(config.run_dir, training.keep_checkpoints))
        run, state = _begin(setup, chosen, checkpoints, stack)
        if run.start == 0:
            run.progress.message("evaluating before the first step; the sampler compiles first")
            _evaluate(run, 0, state)
        for step in range(run.start + 1, training.num_steps + 1):
            state, record = _step(run, step, state)
            try:
                run.recorder.add(record)
            except Diverged:  # the state is the last sound one
                checkpoints.save(step, state, run.streams.state())
                checkpoints.wait()
                raise

            last, stopping = step == training.num_steps, stop_requested()
            if last or _due(step, config.evaluation.every):
                run.recorder.flush()
                _evaluate(run, step, state)
            if last or stopping or _due(step, training.checkpoint_every):
                run.recorder.flush()  # resume cuts metrics back to the checkpoint: they come first
                checkpoints.save(step, state, run.streams.state())
            if stopping and not last:
                checkpoints.wait()
                run.progress.message(
                    f"stopped after step {step} and saved; continue with\n"
                    f"  python run.py --config {config.run_dir}/config.yaml"
                )
                return 130
    _finish(setup, run.policy(state))
    return 0


def _begin(
    setup: Setup, chosen: str, checkpoints: Checkpoints, stack: contextlib.ExitStack
) -> tuple[_Run, TrainState]:
    """Enters what is open through the run into `stack`; makes or restores the state; says what the
    run starts from, `chosen` (see `with_rows`) included; verifies demonstrations."""
    config, num_steps = setup.config, setup.config.training.num_steps
    pool = stack.enter_context(reward_pool(setup))
    stack.enter_context(jax.set_mesh(setup.mesh))
    compilations = stack.enter_context(Compilations())
    profiler = stack.enter_context(
        Profiler(f"{config.run_dir}/profile", config.training.profile_steps)
    )
    keep_model_files(setup)
    streams = Streams(setup)
    optimizers = make_optimizers(
        config.training,
        setup.stages,
        prompts_per_step=config.data.prompts_per_step,
        model_config=setup.model_config,
    )
    state, start = fresh_or_resumed(setup, optimizers.transformations, checkpoints, streams)
    # With LoRA; no checkpoint holds it.
    frozen = load_frozen(config.model, setup.model_config, setup.mesh, config.seed)
    open_run_dir(config, start)
    writer = stack.enter_context(RunWriter(config.run_dir))
    progress = stack.enter_context(ProgressLine(num_steps))
    progress.message(to_yaml(config))
    if chosen:
        progress.message(chosen)
    progress.message(batch_arithmetic(setup, frozen, state.params))
    if start == num_steps:
        progress.message(f"already at step {start} of {start}: nothing to train")
    elif start:
        progress.message(f"continues after step {start} of {num_steps}")
    demonstrations = rollouts.verify_demonstrations(setup, pool)
    for line in rollouts.describe_demonstrations(setup, demonstrations):
        progress.message(line)
    reference = load_reference(config.model, setup.objective, frozen, setup.mesh)
    run = _Run(
        setup=setup,
        start=start,
        frozen=frozen,
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
        streams=streams,
        demonstrations=demonstrations,
        pool=pool,
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
        profiler=profiler,
        compilations=compilations,
    )
    return run, state


def batch_arithmetic(setup: Setup, frozen: Params, trained: Params) -> str:
    """Return the table of what a step is made of, for the parameters or their shapes."""
    config = setup.config
    return summary.arithmetic_table(
        summary.data_rows(setup.sets, setup.dropped),
        summary.policy_rows(frozen, trained, setup.tokenizer),
        [["objective", config.objective.preset]],
        summary.rollout_rows(
            setup.objective,
            prompts_per_step=config.data.prompts_per_step,
            completions_per_prompt=config.rollout.completions_per_prompt,
        ),
        summary.update_rows(setup.stages, config.training, setup.longest_sequence),
        summary.device_rows(setup.mesh),
    )


def _step(run: _Run, step: int, state: TrainState) -> tuple[TrainState, StepRecord]:
    """Rollouts, then updates on them; `state` is donated."""
    setup, training = run.setup, run.setup.config.training
    run.profiler.begin(step)
    began, stage = time.monotonic(), setup.stages.at(step)
    what = f"step {step}/{training.num_steps}, rollout"
    experience = rollouts.collect(
        setup,
        stage,
        step,
        run.policy(state),
        run.streams,
        run.pool,
        run.demonstrations,
        summary.rollout_observer(run.progress, what),
    )
    rolled_out = time.monotonic()
    completions = [one for group in experience.sampled for one in group.scored]
    for warning in run.watch.warnings(step, completions):
        run.progress.message(warning)
    of_step = make_updates(setup, stage, step, experience.groups, run.streams)
    host = rollout_metrics(setup, stage, experience) | mix_metric(stage, step)
    host |= updates.update_metrics(of_step, state, run.learning_rates)
    state, metrics = updates.apply(
        run.functions,
        state,
        of_step,
        setup.mesh,
        measure_norms=_due(step, training.gradient_norms_every),
    )
    run.recorder.flush()  # the previous step's records, while the device computes this one
    jax.block_until_ready(state)
    run.profiler.end()
    host |= _timing(began, rolled_out, of_step)
    host |= _compiled(run, f"step {step}", expected=step == run.start + 1)
    samples, batches = sample_rows(experience.groups), [update.batch for update in of_step]
    return state, StepRecord(step, metrics, host, samples, batches)


def _compiled(run: _Run, where: str, *, expected: bool) -> dict[str, float]:
    """Prints what has compiled since the last call, a line for each program where `expected`, else
    all in one; returns the metrics."""
    metrics, programs = run.compilations.since_last()
    if programs and expected:
        run.progress.message("\n".join(compilation_lines(programs)))
    elif programs:
        run.progress.message(f"{where} compiled {', '.join(map(str, programs))}")
    return metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _timing(began: float, rolled_out: float, of_step: Sequence[Update]) -> dict[str, float]:
    now = time.monotonic()
    num_tokens = sum(int((update.batch.rows.segment_ids > 0).sum()) for update in of_step)
    return {
        "time/step": now - began,
        "time/rollout": rolled_out - began,
        "time/train": now - rolled_out,
        "perf/tokens_per_second": num_tokens / (now - began),
    }


def _evaluate(run: _Run, step: int, state: TrainState) -> None:
    """Scores the policy on the evaluation sets; the verdicts go among the samples."""
    setup, began = run.setup, time.monotonic()
    values, rows = evaluate(
        run.policy(state),
        setup.model_config,
        setup.evaluation_sets,
        setup.tokenizer,
        run.pool,
        setup.evaluation_sampling,
        threshold=setup.config.rewards.correct_threshold,
        observer=summary.rollout_observer(run.progress, f"step {step}, evaluation"),
    )
    _compiled(run, f"step {step}, evaluation,", expected=step == 0)  # or the next step counts them
    run.writer.metrics(step, values | {"time/evaluation": time.monotonic() - began})
    run.writer.samples([{"step": step} | row for row in rows])
    scores = [
        f"{key.split('/')[1]} {value:.1%}" for key, value in values.items() if "pass@1" in key
    ]
    run.progress.message(f"step {step}: pass@1 " + ", ".join(scores))


def _finish(setup: Setup, params: Params) -> None:
    """Exports, writes the report, and says where everything is."""
    run_dir = setup.config.run_dir
    export = write_export(setup.config, params)
    if jax.process_index() != 0:
        return
    report = write_report(run_dir)
    print(summary.before_after(run_dir))
    print(f"model    {export}\nreport   {report}\nmetrics  {run_dir}/metrics.jsonl")
