"""What a step leaves behind: a line of metrics, a few samples, a line on the terminal.

A step's records are written while the device computes the next step.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from srft_jax.batch import Metrics
from srft_jax.config import ReportConfig, RunError
from srft_jax.report.terminal import Progress
from srft_jax.report.writers import RunWriter

# Steps of one and the same mean reward after which a run is told to look at its prompts.
CONSTANT_REWARD_STEPS = 10


class Recorder:
    """Holds one step's records until `flush`."""

    def __init__(self, writer: RunWriter, progress: Progress, config: ReportConfig) -> None:
        self._writer = writer
        self._progress = progress
        self._config = config
        self._pending: (
            tuple[int, Sequence[Metrics], dict[str, float], list[dict[str, Any]]] | None
        ) = None
        self._rewards: deque[float] = deque(maxlen=CONSTANT_REWARD_STEPS)

    def add(
        self,
        step: int,
        updates: Sequence[Metrics],
        host: dict[str, float],
        samples: list[dict[str, Any]],
    ) -> None:
        """Takes a step's metrics: the device's, a dict an optimizer step, and the host's."""
        self._pending = (step, updates, host, samples)

    def flush(self) -> None:
        """Writes and shows what is held; several optimizer steps are averaged."""
        if self._pending is None:
            return
        step, updates, host, samples = self._pending
        self._pending = None
        values = host | {
            name: float(np.mean([update[name] for update in updates if name in update]))
            for name in dict.fromkeys(name for update in updates for name in update)
        }
        self._writer.metrics(step, values)
        _check_finite(step, values)
        self._writer.samples(
            [{"step": step} | row for row in samples[: self._config.samples_per_step]]
        )
        self._progress.update(step, values)
        if samples and step % self._config.samples_every == 0:
            self._progress.message(describe(samples[0]))
        self._warn_of_constant_reward(step, values)

    def _warn_of_constant_reward(self, step: int, values: dict[str, float]) -> None:
        if "rollout/reward" not in values:
            return
        self._rewards.append(values["rollout/reward"])
        if len(self._rewards) == CONSTANT_REWARD_STEPS and len(set(self._rewards)) == 1:
            self._progress.message(
                f"WARNING: every mean reward since step {step - CONSTANT_REWARD_STEPS + 1} is "
                f"{self._rewards[0]}: no group has anything to learn from. Do the chat template "
                "and the prompts ask for the form that the verifier demands?"
            )
            self._rewards.clear()


def _check_finite(step: int, values: dict[str, float]) -> None:
    """Stops a run that has diverged, before its state is saved over a sound one."""
    broken = {name: value for name, value in values.items() if not math.isfinite(value)}
    if broken:
        raise RunError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in broken.items())}; "
            "nothing was saved since the last checkpoint. Try a lower learning rate"
        )


def describe(sample: dict[str, Any]) -> str:
    """A completion with its verdict, on lines of their own."""
    completion = sample["completion"].replace("\n", "\n    ")
    return (
        f"  {sample['prompt']}  ({sample['answer']})\n    {completion}\n    -> {sample['verdict']}"
    )
