"""The section `training`: the loop, and the optimizers of its updates."""

import dataclasses
from typing import Literal

from srft_jax.config.errors import UsageError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, with linear warm-up, then constant or cosine decay of its learning rate.

    Args:
        name: AdamW; Adafactor, whose second moment is kept by rows and columns, without a first; or
            Muon on the matrices of blocks, which keeps momentum alone, and AdamW on everything
            else. The same learning rate suits all three. See docs/memory.md.
        state_dtype: Type of moments between updates; bfloat16 uses stochastic rounding.
        learning_rate: Highest learning rate, after the warm-up.
        warmup_steps: Optimizer steps until the highest rate, in equal rises.
        schedule: Course of the rate after the warm-up, until training.num_steps.
        final_fraction: Share of the highest rate that is left at the end of a cosine.
        b1: Decay of the first moment, of Muon's momentum too.
        b2: Decay of the second moment; Adafactor's goes by the number of updates.
        weight_decay: Decoupled; applied to matrices only.
        clip_norm: Global norm the gradient is clipped to.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Args:
        num_steps: Rollout steps.
        updates_per_rollout: Optimizer steps each rollout batch is split into, by prompts.
        row_length: Tokens of a packed row, T.
        rows_per_microbatch: Rows of one forward and backward pass, B. auto takes the most that fit
            the memory, by compiling the step for more and more; the run keeps that number.
        memory_mib: Memory of each device, for auto; by default what the device says it has left.
        checkpoint_every: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: Number of checkpoints kept.
        logits_mib: Memory for tiles of logits on each device; see ops/head.py.
        max_skipped: Number of updates in a row, skipped for a loss or gradient that is not finite,
            at which the run stops.
        gradient_norms_every: Steps between measurements of each loss term's own gradient norm; 0
            never measures.
        profile_steps: Steps whose traces are written to run_dir/profile; see docs/memory.md.
        optimizer: Optimizer of the objective's steps.
        demonstration_optimizer: Optimizer of steps on demonstrations alone: the first stage of
            sft_rl, the buffered steps of relift.
    """

    num_steps: int = 100
    updates_per_rollout: int = 1
    row_length: int = 128
    rows_per_microbatch: int | Literal["auto"] = 64
    memory_mib: int | None = None
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    logits_mib: int = 64
    max_skipped: int = 3
    gradient_norms_every: int = 0
    profile_steps: list[int] = dataclasses.field(default_factory=list)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    demonstration_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    @property
    def rows(self) -> int:
        """`rows_per_microbatch`, which must be a number by now; UsageError if it is auto."""
        if self.rows_per_microbatch == "auto":
            raise UsageError(
                "training.rows_per_microbatch = auto is chosen when a run starts: give a number"
            )
        return self.rows_per_microbatch
