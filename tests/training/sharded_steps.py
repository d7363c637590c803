"""Two train steps on one device and on meshes of 2 to 8; prints the largest relative differences.

A script of its own, since the number of devices cannot change once JAX has started. Its arguments
are sizes of data, fsdp, context and tensor, e.g. 2x2x2x1, after the name of a case and a colon.
"""

import dataclasses
import json
import math
import sys
import tempfile

import jax
import jax.monitoring
import numpy as np
import optax
from jax.sharding import Mesh
from tiny_training import MODEL, OPTIONS, batch_of, reference_params, sequences, state_of

from srft_jax.batch import Batch, Rows, TrainState
from srft_jax.config import LoraConfig, MeshConfig, Objective, ObjectiveConfig, OptimizerConfig
from srft_jax.host.compilations import Compilations
from srft_jax.mesh import make_mesh, sharding
from srft_jax.models import init_params, lora
from srft_jax.models.families import param_shardings
from srft_jax.objectives.methods import expand
from srft_jax.ops.head import token_stats
from srft_jax.training.checkpoint import Checkpoints
from srft_jax.training.logprobs import make_old_logprobs
from srft_jax.training.microbatch import FixedParams, StepInputs, in_batch_order, rows_of
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import state_shardings
from srft_jax.training.step import make_gradient_norms, make_train_step

Shape = tuple[int, int, int, int]
# Sums per sequence, over roles, and of all terms: whatever could go wrong across devices. Every
# metric there is comes with it.
OBJECTIVE = expand(
    ObjectiveConfig(
        preset="srft",
        entropy_scope="sequence",
        entropy_bonus=0.01,
        kl=0.1,
        kl_estimator="full",
        old_logprobs="trainer",
        policy_aggregation="sequences",
    )
)
# The head forms its gradient in one go with the statistics.
ELEMENTWISE = dataclasses.replace(OBJECTIVE, entropy_scope="token")
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0), MODEL, num_updates=8)


def mesh_of(shape: Shape) -> Mesh:
    """A mesh of the first devices."""
    return make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def initial_state() -> TrainState:
    """With second moments of 1: Adam's step is then smooth in the gradient, and comparable."""
    return with_moments(state_of(OPTIMIZER))


def with_moments(state: TrainState) -> TrainState:
    adam = state.optimizer_states["policy"]
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), state.params)
    return dataclasses.replace(
        state, optimizer_states={"policy": optax.tree.set(adam, nu=ones, count=np.int32(3))}
    )


def two_steps(
    objective: Objective, state: TrainState, batch: Batch, reference: object
) -> tuple[TrainState, list]:
    """Also checks that the second step runs the first one's program."""
    step = make_train_step(OPTIONS, objective, OPTIMIZER)
    fixed = FixedParams(reference=reference)
    state, first = step(state, batch, fixed)
    with Compilations() as compilations:
        state, second = step(state, batch, fixed)
    _, compiled = compilations.since_last()
    assert not compiled, compiled
    return state, [first, second]


def batch_places(mesh: Mesh, batch: Batch) -> Batch:
    """Where each array of a batch lies."""
    return jax.tree.map(
        lambda x: sharding(mesh, (None, "batch", None) if x.ndim == 3 else (), x.shape), batch
    )


def on_mesh(objective: Objective, shape: Shape, batch: Batch) -> tuple[TrainState, list]:
    mesh = mesh_of(shape)
    state = initial_state()
    where = state_shardings(MODEL, {"policy": OPTIMIZER}, mesh)
    gate = where.params["layers"]["gate"]
    assert gate.shard_shape((2, 16, 32)) == (2, 16 // shape[1], 32 // shape[3])
    assert optax.tree.get(where.optimizer_states["policy"], "mu") == where.params
    inputs = jax.device_put(
        (state, batch, reference_params()), (where, batch_places(mesh, batch), where.params)
    )
    with jax.set_mesh(mesh):
        state, metrics = two_steps(objective, *inputs)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (leaf.sharding, expected)
    return state, metrics


def lora_differences(shape: Shape, batch: Batch) -> dict[str, float]:
    """Two steps of adapters, of which B is random too; the base is the reference."""
    model = lora.adapted(MODEL, LoraConfig(rank=2, alpha=4.0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0), model, 8)
    random = np.random.default_rng(3)
    factors = jax.tree.map(
        lambda x: random.normal(0.0, 0.3, x.shape).astype(np.float32),
        lora.trained(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), model),
    )
    state = dataclasses.replace(
        initial_state(), params=factors, optimizer_states={"policy": optimizer.init(factors)}
    )
    inputs = jax.device_get((with_moments(state), batch, initial_state().params))
    mesh = mesh_of(shape)
    where = state_shardings(model, {"policy": optimizer}, mesh)
    b = where.params["layers"]["down_lora_b"]
    assert b.shard_shape((2, 2, 16)) == (2, 2, 16 // shape[1])

    def both_steps(places: object) -> tuple[TrainState, dict]:
        state, batch, base = jax.device_put(inputs, places)
        options = dataclasses.replace(OPTIONS, model_config=model)
        step, fixed = make_train_step(options, OBJECTIVE, optimizer), FixedParams(base, base)
        return step(step(state, batch, fixed)[0], batch, fixed)

    whole, whole_metrics = both_steps(None)
    base_places = lora.frozen(param_shardings(mesh, model), model)
    with jax.set_mesh(mesh):
        state, metrics = both_steps((where, batch_places(mesh, batch), base_places))
    return {
        "moved": largest_difference(whole.params, factors),
        "metrics": largest_difference(metrics, whole_metrics),
        "params": largest_difference(state.params, whole.params),
    }


def largest_difference(got: object, expected: object) -> float:
    """Relative to the largest entry of each array."""

    def difference(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3))

    return max(jax.tree.leaves(jax.tree.map(difference, got, expected)))


def head_flops(mesh: Mesh) -> float:
    """Operations of one device, for the head alone over rows that are split over all devices."""

    def split(shape: tuple[int, ...], dtype: type) -> jax.ShapeDtypeStruct:
        axes = ("rows", None)[: len(shape)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes, shape))

    head = jax.ShapeDtypeStruct((MODEL.dim, MODEL.vocab_size), np.float32)
    inputs = split((256, MODEL.dim), np.float32), head, split((256,), np.int32)
    with jax.set_mesh(mesh):
        return jax.jit(token_stats).lower(*inputs).compile().cost_analysis()["flops"]


def head_flops_share(shape: Shape) -> float:
    """Share of one device in the operations of all rows."""
    return head_flops(mesh_of(shape)) / head_flops(mesh_of((1, 1, 1, 1)))


def step_differences(objective: Objective, shape: Shape, batch: Batch) -> dict[str, float]:
    whole, whole_metrics = on_one_device(objective, batch)
    state, metrics = on_mesh(objective, shape, batch)
    by_name, whole_by_name = (
        {name: [one_step[name] for one_step in steps] for name in steps[0]}
        for steps in (metrics, whole_metrics)
    )
    return {
        **{name: largest_difference(by_name[name], whole_by_name[name]) for name in by_name},
        "moved": largest_difference(whole.params, initial_state().params),
        "params": largest_difference(state.params, whole.params),
        "optimizer": largest_difference(state.optimizer_states, whole.optimizer_states),
    }


_ON_ONE_DEVICE: dict[Objective, tuple[TrainState, list]] = {}


def on_one_device(objective: Objective, batch: Batch) -> tuple[TrainState, list]:
    if objective not in _ON_ONE_DEVICE:
        _ON_ONE_DEVICE[objective] = two_steps(objective, initial_state(), batch, reference_params())
    return _ON_ONE_DEVICE[objective]


def pass_differences(shape: Shape, batch: Batch) -> dict[str, float]:
    """Differences of what is computed beside steps: old log-probs, norms of the gradient of each
    term, and the tokens that `replay` prints."""
    state, reference = initial_state(), reference_params()
    inputs = (state, batch, reference)

    def passes(state: TrainState, batch: Batch, reference: object) -> tuple:
        old = make_old_logprobs(OPTIONS)(state.params, batch).rows.old_logprobs
        inputs = StepInputs(state, batch, FixedParams(reference=reference))
        norms = make_gradient_norms(OPTIONS, OBJECTIVE)(inputs)
        ordered = jax.jit(lambda batch: in_batch_order(flat_rows(batch), batch))(batch)
        return old, norms, ordered

    old, norms, _ = passes(*inputs)
    mesh = mesh_of(shape)
    params_places = param_shardings(mesh, MODEL)
    state_places = state_shardings(MODEL, {"policy": OPTIMIZER}, mesh)
    inputs = jax.device_put(inputs, (state_places, batch_places(mesh, batch), params_places))
    with jax.set_mesh(mesh):
        got_old, got_norms, ordered = passes(*inputs)
    return {
        "moved": largest_difference(old, batch.rows.old_logprobs),
        "old logprobs": largest_difference(got_old, old),
        "norms": largest_difference(got_norms, norms),
        "order": largest_difference(ordered, jax.tree.map(lambda x: x[1], batch.rows)),
    }


def restore_differences(shape: Shape) -> dict[str, float]:
    """A state saved from fsdp=8 and restored onto a mesh of this shape: leaves of other bits."""
    random = np.random.default_rng(4)
    state = jax.tree.map(
        lambda x: random.normal(size=np.shape(x)).astype(np.asarray(x).dtype), initial_state()
    )

    def on(shape: Shape) -> TrainState:
        return state_shardings(MODEL, {"policy": OPTIMIZER}, mesh_of(shape))

    saved = jax.device_put(state, on((1, 8, 1, 1)))
    like = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), saved, on(shape)
    )
    with tempfile.TemporaryDirectory() as run_dir:
        with Checkpoints(run_dir, keep=1) as checkpoints:
            checkpoints.save(3, saved, {"position": 5})
            checkpoints.wait()
            restored, data_state = checkpoints.restore(3, like)
        with Checkpoints(run_dir, keep=1) as checkpoints:
            params = checkpoints.restore_params(3, like.params)
    assert data_state == {"position": 5}
    assert jax.tree.map(lambda x: x.sharding, restored) == on(shape)
    pairs = [(restored, state), (params, state.params)]
    other = [
        np.asarray(a).tobytes() != np.asarray(b).tobytes()
        for got, whole in pairs
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True)
    ]
    gate, saved_gate = (x.params["layers"]["gate"].sharding for x in (restored, saved))
    moved = gate.shard_shape((2, 16, 32)) != saved_gate.shard_shape((2, 16, 32))
    return {"moved": float(moved), "leaves of other bits": float(sum(other))}


def flat_rows(batch: Batch) -> Rows:
    """The tokens of microbatch 1, flat."""
    return jax.tree.map(lambda x: x.reshape(-1), rows_of(batch, 1))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    batch = batch_of(sequences(), OBJECTIVE, rows_per_microbatch=4, shape=(2, 8))
    cases = {
        "": lambda shape: step_differences(OBJECTIVE, shape, batch),
        "elementwise:": lambda shape: step_differences(ELEMENTWISE, shape, batch),
        "lora:": lambda shape: lora_differences(shape, batch),
        "passes:": lambda shape: pass_differences(shape, batch),
        "restore:": restore_differences,
        "head:": head_flops_share,
    }
    results: dict = {}
    for name in sys.argv[1:]:
        case, colon, sizes = name.rpartition(":")
        data, fsdp, context, tensor = map(int, sizes.split("x"))
        results[name] = cases[case + colon]((data, fsdp, context, tensor))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
