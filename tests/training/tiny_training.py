"""A model of two small layers, ragged sequences, and an optimizer that hands back the gradient."""

from typing import Any

import jax
import numpy as np
import optax

from srft_jax.batch import Batch, Role, TrainState
from srft_jax.config import ModelConfig, TrainingConfig
from srft_jax.models import init_params
from srft_jax.objectives.methods import Objective
from srft_jax.objectives.rows import TrainingSequence, make_batch

MODEL = ModelConfig(
    vocab_size=32,
    dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=32,
    rope_theta=10_000.0,
)
ROW_LENGTH, LENGTH_CAP = 16, 10
PREVIOUS_ENTROPY = (0.9, 0.4)  # of rollouts, of demonstrations


def sequences(seed: int = 0) -> list[TrainingSequence]:
    """Sixteen rollouts and three demonstrations, ragged, of 1 to 10 trained tokens.

    The demonstrations are the longest, so that packing leaves the last rows without any.
    """
    random = np.random.default_rng(seed)
    made = []
    for number in range(17):
        role = Role.DEMONSTRATION if number < 3 else Role.SELF
        size = 10 - number if number < 3 else int(random.integers(1, 7))
        tokens = random.integers(1, MODEL.vocab_size, 3 + size).tolist()
        old = random.uniform(-4.5, -2.5, size).tolist() if role == Role.SELF else None
        advantage = [0.75, -0.25, 0.0, -0.5][number % 4]
        made.append(TrainingSequence(tokens[:3], tokens[3:], role, advantage, advantage > 0, old))
    return made


def batch_of(
    sequences: list[TrainingSequence],
    objective: Objective,
    rows_per_microbatch: int,
    shape: tuple[int, int],
) -> Batch:
    """Packed with that many rows in a microbatch, then padded to [M, B] = `shape`.

    However the rows are split, the batch has one shape, hence one compiled step.
    """
    training = TrainingConfig(row_length=ROW_LENGTH, rows_per_microbatch=rows_per_microbatch)
    batch = make_batch(
        sequences, objective, training, num_microbatches=shape[0], length_cap=LENGTH_CAP
    )
    padding = [(0, 0), (0, shape[1] - rows_per_microbatch), (0, 0)]
    rows = jax.tree.map(lambda x: np.pad(x, padding), batch.rows)
    return Batch(rows, batch.normalisers, batch.num_microbatches)


def state_of(optimizer: optax.GradientTransformation) -> TrainState:
    """Step 7 in host memory, so that a step cannot donate it; biases and norms are random too."""
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: random.normal(0.0, 0.3, x.shape).astype(np.float32),
        jax.eval_shape(lambda key: init_params(MODEL, key), jax.random.key(0)),
    )
    own, demonstration = (np.float32(x) for x in PREVIOUS_ENTROPY)
    return TrainState(np.int32(7), params, {"policy": optimizer.init(params)}, own, demonstration)


def gradient_keeper() -> optax.GradientTransformation:
    """Its state is the gradient; parameters stay."""

    def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: 0 * x, gradient), gradient

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: 0 * x, params), update
    )
