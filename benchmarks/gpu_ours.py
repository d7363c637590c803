"""Our side of benchmarks/gpu.py: the train step and the sampler of a run."""

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_figures import (
    matmul_flops,
    matmul_shapes,
    model_of,
    sample_figures,
    timed,
    train_figures,
)
from trajectories import random_trajectory

from srft_jax.batch import Batch, Role
from srft_jax.config import ModelConfig, Objective, ObjectiveConfig, OptimizerConfig, TrainingConfig
from srft_jax.models.decoder import Runtime, init_params, num_params
from srft_jax.objectives.methods import expand
from srft_jax.objectives.rows import TrainingSequence, make_batch
from srft_jax.ops.attention import Kernel
from srft_jax.rollout import Request, RolloutProgress, SamplingConfig
from srft_jax.rollout import sample as draw
from srft_jax.setup.attention_kernel import resolve_attention
from srft_jax.training.microbatch import ForwardOptions
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import new_state
from srft_jax.training.step import make_train_step


def train(args: argparse.Namespace) -> dict[str, Any]:
    model, objective = model_of(args), expand(ObjectiveConfig(preset="srft"))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6), model, num_updates=1000)
    runtime = Runtime(dtype=args.dtype, remat=args.remat, attention=kernel_of(args))
    options = ForwardOptions(model, runtime, temperature=1.0, logits_mib=args.logits_mib)
    step = make_train_step(options, objective, optimizer)
    make = jax.jit(lambda key: new_state(init_params(model, key), {"policy": optimizer}))
    state = make(jax.random.key(0))
    count, batch = num_params(state.params), jax.device_put(packed_batch(args, objective, model))

    def run() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch))
        assert np.isfinite(metrics["loss/total"]) and not metrics["loss/skipped"]

    seconds = timed(run, args.iters)
    found = train_figures(args, count, seconds, our_matmul(args), device_kind())
    return found | {"kernel": kernel_of(args)} | our_memory()


def packed_batch(args: argparse.Namespace, objective: Objective, model: ModelConfig) -> Batch:
    """`--microbatches` of one full row each; an eighth of each sequence is its prompt, and every
    eighth sequence a demonstration."""
    random, length = np.random.default_rng(0), args.row_length // args.sequences
    sequences = []
    for number in range(args.microbatches * args.sequences):
        tokens = random.integers(0, model.vocab_size, length + 1)  # the last is a target only
        sequences.append(
            TrainingSequence(
                tokens[: length // 8],
                random_trajectory(tokens[length // 8 :], None, number % 2 == 1),
                Role.DEMONSTRATION if number % 8 == 7 else Role.SELF,
                advantage=float(random.normal()),
            )
        )
    training = TrainingConfig(row_length=args.row_length, rows_per_microbatch=1)
    return make_batch(
        sequences,
        objective,
        training,
        num_microbatches=args.microbatches,
        length_cap=length,
        on_policy=True,
    )


def sample(args: argparse.Namespace) -> dict[str, Any]:
    model = model_of(args)
    make = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(args.dtype), init_params(model, key))
    )
    params = make(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (args.batch, args.prompt))
    requests = [Request(prompt.tolist()) for prompt in prompts]
    sampling = SamplingConfig(
        max_new_tokens=args.new,
        slots=args.batch,
        segment=args.segment,
        dtype=args.dtype,
        attention=kernel_of(args),
    )
    ends: list[RolloutProgress] = []

    def run() -> None:
        seen: list[RolloutProgress] = []
        draw(params, model, requests, jax.random.key(len(ends)), sampling, observer=seen.append)
        assert seen[-1].tokens == args.batch * args.new
        ends.append(seen[-1])

    timed(run, args.iters)
    counted = ends[2:]
    # What the host does between two segments is part of decoding.
    decode = statistics.median(one.seconds - one.prefill_seconds for one in counted)
    prefill = statistics.median(one.prefill_seconds for one in counted)
    count = num_params(params)
    found = sample_figures(args, count, decode, prefill, device_kind())
    return found | {"decode_steps": counted[-1].steps} | our_memory()


def kernel_of(args: argparse.Namespace) -> Kernel:
    """Of attention, as a run resolves it for the device at hand."""
    return resolve_attention(args.attention, jax.devices()[0].platform, model_of(args), args.dtype)


def our_matmul(args: argparse.Namespace) -> float:
    """FLOP/s of one (x @ w) @ y."""
    x, w, y = (jnp.ones(shape, args.dtype) for shape in matmul_shapes(args))
    product = jax.jit(lambda x, w, y: (x @ w) @ y)
    seconds = timed(lambda: jax.block_until_ready(product(x, w, y)), 9)
    return matmul_flops(args) / seconds


def device_kind() -> str:
    return jax.devices()[0].device_kind


def our_memory() -> dict[str, Any]:
    """What the allocator has given at most; a CPU does not say."""
    stats = jax.devices()[0].memory_stats()
    return {"peak_gib": stats["peak_bytes_in_use"] / 2**30 if stats else None}
