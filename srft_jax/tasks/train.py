"""The training loop: the only one, for every objective.

prompts -> groups (rollout, rewards) -> sequences -> packed batches -> train_step -> metrics
"""

import contextlib
import time
from collections.abc import Sequence

import jax

from srft_jax.config import RunConfig, to_yaml
from srft_jax.evaluation.scores import evaluate
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.report.page import write_report
from srft_jax.report.terminal import Progress
from srft_jax.report.writers import RunWriter
from srft_jax.rewards import RewardPool
from srft_jax.tasks import rollouts, summary, updates
from srft_jax.tasks.batches import Update, make_updates
from srft_jax.tasks.compilations import Compilations, listed
from srft_jax.tasks.export import keep_model_files, write_export
from srft_jax.tasks.interrupt import stop_requests
from srft_jax.tasks.microbatch_size import with_rows
from srft_jax.tasks.profiler import Profiler
from srft_jax.tasks.records import Diverged, Recorder
from srft_jax.tasks.resume import check_same_run, fresh_or_resumed, open_run_dir
from srft_jax.tasks.rollout_metrics import mix_metric, rollout_metrics, sample_rows
from srft_jax.tasks.setup import Setup, prepare, reward_pool
from srft_jax.tasks.states import load_frozen, load_reference
from srft_jax.tasks.streams import Streams
from srft_jax.tasks.verdict_watch import VerdictWatch
from srft_jax.training.checkpoint import Checkpoints


def train(config: RunConfig) -> int:
    """Trains to `training.num_steps`, from the newest checkpoint of the run directory if any.

    Returns:
        Exit code: 0, or 130 where a signal stopped the run, which has then saved.
    """
    setup, chosen = with_rows(prepare(config))
    config, run_dir = setup.config, setup.config.run_dir
    check_same_run(config)
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(stop_requests())
        checkpoints = stack.enter_context(Checkpoints(run_dir, config.training.keep_checkpoints))
        pool = stack.enter_context(reward_pool(setup))
        stack.enter_context(jax.set_mesh(setup.mesh))
        compilations = stack.enter_context(Compilations())
        profiler = stack.enter_context(Profiler(config))
        keep_model_files(setup)
        streams = Streams(setup)
        state, start = fresh_or_resumed(setup, checkpoints, streams)
        # With LoRA; no checkpoint holds it.
        frozen = load_frozen(config, setup.model_config, setup.mesh)
        open_run_dir(config, start)
        writer = stack.enter_context(RunWriter(run_dir))
        progress = stack.enter_context(Progress(config.training.num_steps))
        recorder, watch = Recorder(writer, progress, config), VerdictWatch()
        progress.message(to_yaml(config))
        if chosen:
            progress.message(chosen)
        progress.message(summary.batch_arithmetic(setup, frozen, state.params))

        if start == config.training.num_steps:
            progress.message(f"already at step {start} of {start}: nothing to train")
        elif start:
            progress.message(f"continues after step {start} of {config.training.num_steps}")
        demonstrations = rollouts.verify_demonstrations(setup, pool)
        for line in rollouts.describe_demonstrations(setup, demonstrations):
            progress.message(line)
        reference = load_reference(setup, frozen)
        programs = {
            one: updates.make_programs(setup, one, frozen, reference) for one in setup.stages
        }
        policy = lora.whole(frozen, state.params)
        if start == 0:
            progress.message("evaluating before the first step; the sampler compiles first")
            _evaluate(setup, policy, pool, 0, writer, progress, compilations)
        for step in range(start + 1, config.training.num_steps + 1):
            profiler.begin(step)
            began, stage = time.monotonic(), setup.stage_at(step)
            what = f"step {step}/{config.training.num_steps}, rollout"
            observer = summary.rollout_observer(progress, what)
            experience = rollouts.collect(
                setup, stage, step, policy, streams, pool, demonstrations, observer
            )
            rolled_out = time.monotonic()
            completions = [one for group in experience.sampled for one in group.scored]
            for warning in watch.warnings(step, completions):
                progress.message(warning)
            of_step = make_updates(setup, stage, step, experience.groups, streams)
            host = rollout_metrics(setup, stage, experience) | mix_metric(stage, step)
            host |= updates.describe(setup, state, of_step)
            state, metrics = updates.apply(
                programs,
                state,
                of_step,
                setup.mesh,
                measure_norms=_due(step, config.training.gradient_norms_every),
            )
            policy = lora.whole(frozen, state.params)
            recorder.flush()  # the previous step's records, while the device computes this one
            jax.block_until_ready(state)
            profiler.end()
            host |= _timing(began, rolled_out, of_step)
            compile_metrics, compiled = compilations.since_last()
            host |= compile_metrics
            if compiled and step == start + 1:
                progress.message("\n".join(listed(compiled)))
            elif compiled:  # nobody expects it after the first
                progress.message(f"step {step} compiled {', '.join(map(str, compiled))}")
            try:
                batches = [update.batch for update in of_step]
                recorder.add(step, metrics, host, sample_rows(experience.groups), batches)
            except Diverged:  # the state is the last sound one
                checkpoints.save(step, state, streams.state())
                checkpoints.wait()
                raise

            last, stopping = step == config.training.num_steps, stop_requested()
            if last or _due(step, config.evaluation.every):
                recorder.flush()
                _evaluate(setup, policy, pool, step, writer, progress, compilations)
            if last or stopping or _due(step, config.training.checkpoint_every):
                recorder.flush()  # resume cuts the metrics back to the checkpoint: they come first
                checkpoints.save(step, state, streams.state())
            if stopping and not last:
                checkpoints.wait()
                progress.message(
                    f"stopped after step {step} and saved; continue with\n"
                    f"  python run.py --config {run_dir}/config.yaml"
                )
                return 130
    _finish(setup, policy)
    return 0


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


def _evaluate(
    setup: Setup,
    params: Params,
    pool: RewardPool,
    step: int,
    writer: RunWriter,
    progress: Progress,
    compilations: Compilations,
) -> None:
    began = time.monotonic()
    values, rows = evaluate(
        params,
        setup.model_config,
        setup.evaluation_sets,
        setup.tokenizer,
        pool,
        setup.evaluation_sampling,
        threshold=setup.config.rewards.correct_threshold,
        observer=summary.rollout_observer(progress, f"step {step}, evaluation"),
    )
    _, compiled = compilations.since_last()  # or the next step would count them
    if compiled and step > 0:
        names = ", ".join(map(str, compiled))
        progress.message(f"step {step}, evaluation, compiled {names}")
    elif compiled:
        progress.message("\n".join(listed(compiled)))
    writer.metrics(step, values | {"time/evaluation": time.monotonic() - began})
    writer.samples([{"step": step} | row for row in rows])
    scores = [
        f"{key.split('/')[1]} {value:.1%}" for key, value in values.items() if "pass@1" in key
    ]
    progress.message(f"step {step}: pass@1 " + ", ".join(scores))


def _finish(setup: Setup, params: Params) -> None:
    """Exports, writes the report, and says where everything is."""
    run_dir = setup.config.run_dir
    export = write_export(setup.config, params)
    if jax.process_index() != 0:
        return
    report = write_report(run_dir)
    print(summary.before_after(run_dir))
    print(f"model    {export}\nreport   {report}\nmetrics  {run_dir}/metrics.jsonl")
