"""A model of two small layers, ragged sequences, and steps that hand back the gradient."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from made_sequences import made_sequence

from srft_jax.batch import Batch, Metrics, Role, Rows, TrainState
from srft_jax.config import ModelConfig, Objective, ObjectiveConfig, TrainingConfig
from srft_jax.models import forward, init_params, output_head
from srft_jax.models.decoder import Runtime
from srft_jax.objectives.methods import expand
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.training.microbatch import FixedParams, ForwardOptions
from srft_jax.training.step import make_train_step

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
SHAPE = (4, 8)  # microbatches, rows
TEMPERATURE = 0.8
OPTIONS = ForwardOptions(MODEL, Runtime(), TEMPERATURE, logits_mib=64)

# Every mechanism that could go wrong across microbatches or devices; in the last row the options
# that no preset takes.
_SETTINGS: dict[str, dict[str, Any]] = {
    name: {"preset": name} for name in ("srft", "srft_paper", "sft_kl", "gspo", "uft")
}
_SETTINGS["all else"] = dict(
    demo_nll_entropy=1,
    self_positive_entropy=-1,
    prefix="one",
    prefix_until=1,
    prefix_policy=0.5,
    entropy_scope="batch",
    entropy_bonus=0.01,
    old_logprobs="trainer",
    kl=0.1,
    kl_estimator="k2",
    demo_aggregation="sequences",
    policy_aggregation="sequence_caps",
)
OBJECTIVES = {name: expand(ObjectiveConfig(**settings)) for name, settings in _SETTINGS.items()}


def sequences(seed: int = 0) -> list[TrainingSequence]:
    """Fourteen rollouts and three demonstrations, ragged, of 1 to 10 trained tokens.

    The demonstrations are the longest, so that packing leaves the last rows without any. Two
    rollouts start with forced tokens: hints, and a prefix of which one token is not trained.
    """
    random = np.random.default_rng(seed)
    made = []
    for number in range(17):
        role = Role.DEMONSTRATION if number < 3 else Role.SELF
        size = 10 - number if number < 3 else int(random.integers(1, 7))
        tokens = random.integers(1, MODEL.vocab_size, 3 + size).tolist()
        old = random.uniform(-4.5, -2.5, size).tolist() if role == Role.SELF else None
        advantage = [0.75, -0.25, 0.0, -0.5][number % 4]
        weight = [1.0, 0.7, 1.3][number % 3]
        roles = _FORCED.get(number, [])[:size] + [role] * (size - len(_FORCED.get(number, [])))
        made.append(
            made_sequence(tokens[:3], tokens[3:], roles, advantage, advantage > 0, old, weight)
        )
    return made


_FORCED = {15: [Role.HINT, Role.HINT], 16: [Role.PREFIX, Role.NONE, Role.PREFIX]}


def ends_in_role(sequence: TrainingSequence, *roles: Role) -> bool:
    """Its last token is of one of these roles."""
    return sequence.roles[-1] in roles


def batch_of(
    sequences: list[TrainingSequence],
    objective: Objective,
    rows_per_microbatch: int,
    shape: tuple[int, int],
    **options: Any,
) -> Batch:
    """Packed with that many rows in a microbatch, then padded to [M, B] = `shape`.

    However the rows are split, the batch has one shape, hence one compiled step.
    """
    training = TrainingConfig(row_length=ROW_LENGTH, rows_per_microbatch=rows_per_microbatch)
    batch = make_batch(
        sequences, objective, training, num_microbatches=shape[0], length_cap=LENGTH_CAP, **options
    )
    padding = [(0, 0), (0, shape[1] - rows_per_microbatch), (0, 0)]
    rows = jax.tree.map(lambda x: np.pad(x, padding), batch.rows)
    return dataclasses.replace(batch, rows=rows)


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


@functools.cache
def initial_state() -> TrainState:
    return state_of(gradient_keeper())


@functools.cache
def reference_params() -> Any:
    """Beside the policy."""
    random = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: x + random.normal(0.0, 0.1, x.shape).astype(np.float32), initial_state().params
    )


@functools.cache
def compiled(name: str) -> Any:
    return make_train_step(OPTIONS, OBJECTIVES[name], gradient_keeper())


def step(name: str, batch: Batch, on_policy: bool = False) -> tuple[TrainState, Metrics, Any]:
    """New state, metrics and gradient after one step from the initial state."""
    with jax.default_matmul_precision("highest"):
        batch = dataclasses.replace(batch, on_policy=on_policy)
        fixed = FixedParams(reference=reference_params())
        state, metrics = jax.device_get(compiled(name)(initial_state(), batch, fixed))
    return state, metrics, state.optimizer_states["policy"]


def split(
    name: str,
    rows_per_microbatch: int = 8,
    kept: list[TrainingSequence] | None = None,
    **options: Any,
) -> Batch:
    kept = sequences() if kept is None else kept
    return batch_of(kept, OBJECTIVES[name], rows_per_microbatch, SHAPE, **options)


def largest(tree: Any) -> float:
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnames="temperature")
def _all_logprobs(params: Any, rows: Rows, temperature: float) -> jax.Array:
    hidden = forward(params, MODEL, rows.tokens, rows.positions, rows.segment_ids).hidden
    return jax.nn.log_softmax(hidden @ output_head(params, MODEL) / temperature)


def naive_logprobs(batch: Batch, params: Any, temperature: float = TEMPERATURE) -> np.ndarray:
    """[B, T, V] of the first microbatch."""
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    with jax.default_matmul_precision("highest"):
        return np.asarray(_all_logprobs(params, rows, temperature))


def target_logprobs(logprobs: np.ndarray, batch: Batch) -> np.ndarray:
    """[B, T] of the first microbatch."""
    return np.take_along_axis(logprobs, batch.rows.targets[0][..., None], axis=-1)[..., 0]
