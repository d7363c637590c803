"""The training loop: the only one, for every objective.

prompts -> groups (rollout, rewards) -> sequences -> packed batches -> train_step -> metrics
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import grain
import jax
from etils import epath
from jax.sharding import Mesh

from srft_jax.batch import Batch, TrainState
from srft_jax.config import RunConfig, UsageError, parse, to_yaml
from srft_jax.data.pipeline import PromptBatch, prompt_batches
from srft_jax.evaluation.scores import evaluate
from srft_jax.mesh import sharding
from srft_jax.models.checkpoint_hf import save_hf
from srft_jax.models.decoder import num_params
from srft_jax.objectives.rows import make_batch
from srft_jax.report.page import write_report
from srft_jax.report.terminal import Progress
from srft_jax.report.writers import RunWriter, cut_back
from srft_jax.rewards import RewardPool
from srft_jax.tasks import rollouts, summary
from srft_jax.tasks.interrupt import stop_requests
from srft_jax.tasks.records import Recorder
from srft_jax.tasks.setup import Setup, prepare, reward_pool
from srft_jax.tasks.states import abstract_state, fresh_state, optimizer_of
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.step import make_train_step, present

# Sections that may differ when a run is continued; anything else would make it another run.
MAY_CHANGE = ("run_dir", "evaluation", "generate", "report")


def train(config: RunConfig) -> int:
    """Trains to `training.num_steps`, from the newest checkpoint of the run directory if any.

    Returns:
        Exit code: 0, or 130 where a signal stopped the run, which has then saved.
    """
    setup = prepare(config)
    config, run_dir = setup.config, setup.config.run_dir
    _check_same_run(config)
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(stop_requests())
        checkpoints = stack.enter_context(Checkpoints(run_dir, config.training.keep_checkpoints))
        pool = stack.enter_context(reward_pool(setup))
        prompts = prompt_batches(setup.sets.train, config.data.prompts_per_step, config.seed)
        state, start = _fresh_or_resumed(setup, checkpoints, prompts)
        _open_run_dir(config, start)
        writer = stack.enter_context(RunWriter(run_dir))
        progress = stack.enter_context(Progress(config.training.num_steps))
        recorder = Recorder(writer, progress, config.report)
        progress.message(to_yaml(config))
        progress.message(summary.batch_arithmetic(setup, num_params(state.params)))

        if start == config.training.num_steps:
            progress.message(f"already at step {start} of {start}: nothing to train")
        demonstration_rewards = rollouts.verify_demonstrations(setup, pool)
        for line in rollouts.describe_demonstrations(setup, demonstration_rewards):
            progress.message(line)
        train_step = make_train_step(
            setup.model_config,
            setup.objective,
            optimizer_of(setup),
            temperature=config.rollout.temperature,
            on_policy=config.training.updates_per_rollout == 1,
            runtime=setup.runtime,
        )
        seed = jax.random.fold_in(jax.random.key(config.seed), 1)
        if start == 0:
            progress.message("evaluating before the first step; the sampler compiles first")
            _evaluate(setup, state, pool, 0, writer, progress)
        for step in range(start + 1, config.training.num_steps + 1):
            began = time.monotonic()
            key = jax.random.fold_in(seed, step)
            groups = rollouts.collect(
                setup, state.params, next(prompts), key, pool, demonstration_rewards
            )
            rolled_out = time.monotonic()
            batches = _make_batches(setup, groups)
            metrics = []
            for batch in batches:
                state, of_update = train_step(state, _put(batch, setup.mesh))
                metrics.append(present(of_update, batch.normalisers))
            recorder.flush()  # the previous step's records, while the device computes this one
            jax.block_until_ready(state)
            values = rollouts.metrics(setup, groups) | _timing(began, rolled_out, batches)
            recorder.add(step, metrics, values, rollouts.sample_rows(groups))

            last, stopping = step == config.training.num_steps, stop_requested()
            if last or _due(step, config.evaluation.every):
                recorder.flush()
                _evaluate(setup, state, pool, step, writer, progress)
            if last or stopping or _due(step, config.training.checkpoint_every):
                recorder.flush()  # resume cuts the metrics back to the checkpoint: they come first
                checkpoints.save(step, state, _data_state(setup, prompts))
            if stopping and not last:
                checkpoints.wait()
                progress.message(
                    f"stopped after step {step} and saved; continue with\n"
                    f"  python run.py --config {run_dir}/config.yaml"
                )
                return 130
    _finish(setup, state)
    return 0


def _check_same_run(config: RunConfig) -> None:
    """Refuses to continue a run under another configuration, naming what differs."""
    stored = epath.Path(config.run_dir) / "config.yaml"
    if not stored.exists():
        return
    _, stored_config = parse(["--config", str(stored)])
    before, now = _leaves(dataclasses.asdict(stored_config)), _leaves(dataclasses.asdict(config))
    changed = [
        f"{key} = {now.get(key)} (was {before.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _may_change(key, config)
    ]
    if changed:
        raise UsageError(
            f"{config.run_dir} holds a run with another configuration: {', '.join(changed)}; "
            "choose another run_dir, or delete this one"
        )


def _may_change(key: str, config: RunConfig) -> bool:
    if key == "training.num_steps":  # a cosine's length is the run's, so its past would differ
        return config.training.optimizer.schedule == "constant"
    return key.split(".")[0] in MAY_CHANGE


def _leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _fresh_or_resumed(
    setup: Setup, checkpoints: Checkpoints, prompts: grain.DatasetIterator[PromptBatch]
) -> tuple[TrainState, int]:
    """The state to start from and its step; `prompts` is moved to where it was then."""
    start, run_dir = checkpoints.newest(), setup.config.run_dir
    if start is None:
        return fresh_state(setup), 0
    if start > setup.config.training.num_steps:
        raise UsageError(
            f"{run_dir} has a checkpoint of step {start}, beyond "
            f"training.num_steps = {setup.config.training.num_steps}"
        )
    state, data_state = checkpoints.restore(start, abstract_state(setup))
    if data_state["examples"] != _digest(setup):
        raise UsageError(
            f"the training set is not the one that {run_dir} was started with: the same "
            "configuration now reads other rows"
        )
    prompts.set_state(data_state["iterator"])
    return state, start


def _data_state(setup: Setup, prompts: grain.DatasetIterator[PromptBatch]) -> dict[str, Any]:
    return {"iterator": prompts.get_state(), "examples": _digest(setup)}


def _digest(setup: Setup) -> str:
    """Of the training set: the iterator's state is a position in it and means nothing elsewhere."""
    return hashlib.blake2b(repr(setup.sets.train).encode(), digest_size=16).hexdigest()


def _open_run_dir(config: RunConfig, start: int) -> None:
    """Records of steps after the checkpoint are dropped: those steps are done again."""
    run_dir = epath.Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    cut_back(config.run_dir, start if start else -1)
    (run_dir / "config.yaml").write_text(to_yaml(config))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _make_batches(setup: Setup, groups: Sequence[rollouts.Group]) -> list[Batch]:
    """One batch for each optimizer step, the groups split evenly between them."""
    training = setup.config.training
    per_update = len(groups) // training.updates_per_rollout
    batches = []
    for first in range(0, len(groups), per_update):
        sequences = [
            sequence
            for group in groups[first : first + per_update]
            for sequence in rollouts.training_sequences(setup, group)
        ]
        batches.append(
            make_batch(
                sequences,
                setup.objective,
                training,
                num_microbatches=setup.num_microbatches,
                length_cap=setup.config.rollout.max_new_tokens,
            )
        )
    return batches


def _put(batch: Batch, mesh: Mesh) -> Batch:
    """Rows split over the data-parallel devices, counts on all of them."""
    axes = {3: (None, "rows", None), 0: ()}
    shardings = jax.tree.map(lambda x: sharding(mesh, axes[x.ndim], x.shape), batch)
    return jax.device_put(batch, shardings)


def _timing(began: float, rolled_out: float, batches: Sequence[Batch]) -> dict[str, float]:
    now = time.monotonic()
    num_tokens = sum(int((batch.rows.segment_ids > 0).sum()) for batch in batches)
    return {
        "time/step": now - began,
        "time/rollout": rolled_out - began,
        "time/train": now - rolled_out,
        "perf/tokens_per_second": num_tokens / (now - began),
    }


def _evaluate(
    setup: Setup,
    state: TrainState,
    pool: RewardPool,
    step: int,
    writer: RunWriter,
    progress: Progress,
) -> None:
    began = time.monotonic()
    values, rows = evaluate(
        state.params,
        setup.model_config,
        setup.evaluation_sets,
        setup.tokenizer,
        pool,
        setup.config.evaluation,
        dtype=setup.config.model.dtype,
        threshold=setup.config.rewards.correct_threshold,
    )
    writer.metrics(step, values | {"time/evaluation": time.monotonic() - began})
    writer.samples([{"step": step} | row for row in rows])
    scores = [
        f"{key.split('/')[1]} {value:.1%}" for key, value in values.items() if "pass@1" in key
    ]
    progress.message(f"step {step}: pass@1 " + ", ".join(scores))


def _finish(setup: Setup, state: TrainState) -> None:
    """Exports, writes the report, and says where everything is."""
    run_dir = setup.config.run_dir
    export = epath.Path(run_dir) / "hf"
    save_hf(export, setup.model_config, state.params, setup.tokenizer)
    report = write_report(run_dir)
    print(summary.before_after(run_dir))
    print(f"model    {export}\nreport   {report}\nmetrics  {run_dir}/metrics.jsonl")
