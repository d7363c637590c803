"""The records of a step: a line of metrics, a few samples, a line on the terminal.

A step's records are written while the device computes the next step.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from srft_jax.batch import Metrics
from srft_jax.config import ReportConfig, RunError
from srft_jax.experience.batches import Update
from srft_jax.report.terminal import ProgressLine
from srft_jax.report.writers import RunWriter
from srft_jax.training.saved_batch import save_batch

# Steps with one and the same mean reward, after which a warning says to look at the prompts.
CONSTANT_REWARD_STEPS = 10

# Only before the first update of a rollout is the policy the one that sampled it, so the metrics of
# later updates say nothing about the sampler.
_FIRST_UPDATE_ONLY = ("policy/sampler_kl", "policy/sampler_max_difference")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What is known of a step once its updates are computed.

    Attributes:
        step: Number of the step, from 1.
        metrics: Metrics of each update.
        host: All other metrics.
        samples: Completions, as lines of samples.jsonl.
        updates: Stage and batch of each update.
    """

    step: int
    metrics: Sequence[Metrics]
    host: dict[str, float]
    samples: list[dict[str, Any]]
    updates: Sequence[Update]


class Diverged(RunError):
    """Too many updates in a row were skipped; the state is still the last sound one."""


class Recorder:
    """Holds one step's records until `flush`, and counts the updates that were skipped.

    Args:
        writer: Files of the run directory.
        progress: Line on the terminal.
        run_dir: Run directory, for batches of skipped updates.
        max_skipped: Skipped updates in a row at which the run stops.
        report: How many samples are written, and how often one is printed.
    """

    def __init__(
        self,
        writer: RunWriter,
        progress: ProgressLine,
        *,
        run_dir: str,
        max_skipped: int,
        report: ReportConfig,
    ) -> None:
        self._writer = writer
        self._progress = progress
        self._run_dir = run_dir
        self._max_skipped = max_skipped
        self._report = report
        self._pending: StepRecord | None = None
        self._rewards: deque[float] = deque(maxlen=CONSTANT_REWARD_STEPS)
        self._skipped_in_a_row = 0

    def add(self, record: StepRecord) -> None:
        """Take a step's record, and save the batch of each skipped update.

        Raises:
            Diverged: training.max_skipped updates in a row were skipped; all is written by then.
        """
        # Batches are not held until `flush`.
        self._pending = dataclasses.replace(record, updates=())
        for update, metrics in zip(record.updates, record.metrics, strict=True):
            skipped = any(bool(x) for name, x in metrics.items() if name.endswith("loss/skipped"))
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            if skipped:
                self._report_skipped(record.step, offender(metrics), update)

    def _report_skipped(self, step: int, what: str, update: Update) -> None:
        path = save_batch(self._run_dir, step, update.stage.name, update.batch)
        text = f"step {step}: {what} is not finite; its batch is in {path}"
        self._progress.message(f"WARNING: {text}, and the update was skipped")
        if self._skipped_in_a_row < self._max_skipped:
            return
        self.flush()
        raise Diverged(
            f"{text}, and no update was made {self._skipped_in_a_row} times in a row "
            "(training.max_skipped). See which sequences it is with\n"
            f"  python run.py replay --config {self._run_dir}/config.yaml"
        )

    def flush(self) -> None:
        """Write and show the record that is held, if there is one."""
        if self._pending is None:
            return
        record, self._pending = self._pending, None
        step, samples = record.step, record.samples
        values = record.host | over_updates(record.metrics)
        self._writer.metrics(step, values)
        self._writer.samples(
            [{"step": step} | row for row in samples[: self._report.samples_per_step]]
        )
        self._progress.update(step, values)
        if samples and step % self._report.samples_every == 0:
            self._progress.message(describe_sample(samples[0]))
        if samples:
            self._warn_of_constant_reward(step, values, samples[0])

    def _warn_of_constant_reward(
        self, step: int, values: dict[str, float], sample: dict[str, Any]
    ) -> None:
        """Warn if the verifier's reward stays the same; shaping may vary without a right answer."""
        self._rewards.append(values.get("rewards/verifier", values["rollout/reward"]))
        if len(self._rewards) == CONSTANT_REWARD_STEPS and len(set(self._rewards)) == 1:
            self._progress.message(
                f"WARNING: every mean reward since step {step - CONSTANT_REWARD_STEPS + 1} is "
                f"{self._rewards[0]}: completions teach nothing. Do the chat template "
                f"and the prompts ask for the form that the verifier {sample['kind']} demands?\n"
                + describe_sample(sample)
            )
            self._rewards.clear()


def over_updates(updates: Sequence[Metrics]) -> dict[str, float]:
    """Return a step's metrics, from those of its updates: the minimum, maximum or sum where a
    metric's name says so, the first value where only that one counts, else the mean."""
    names = dict.fromkeys(name for update in updates for name in update)
    return {
        name: _reduced(name, [float(update[name]) for update in updates if name in update])
        for name in names
    }


def _reduced(name: str, values: list[float]) -> float:
    if name.endswith(_FIRST_UPDATE_ONLY):
        return values[0]
    if name.endswith("loss/skipped"):
        return sum(values)
    by = np.min if name.endswith("_min") else np.max if name.endswith("_max") else np.mean
    return float(by(values))


def offender(update: Metrics) -> str:
    """Return the name of the first loss term that is not finite, "the gradient" where all are."""
    no_terms = ("total", "skipped", "gradient_norm")
    terms = [name for name in update if "loss/" in name and not name.endswith(no_terms)]
    return next((name for name in terms if not math.isfinite(update[name])), "the gradient")


def describe_sample(sample: dict[str, Any]) -> str:
    """Return lines that show a completion, as in samples.jsonl, with its prompt and verdict."""
    completion = sample["completion"].replace("\n", "\n    ")
    return (
        f"  {sample['prompt']}  ({sample['answer']})\n    {completion}\n    -> {sample['verdict']}"
    )
