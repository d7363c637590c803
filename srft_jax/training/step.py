"""The train step: forward, head and backward of each microbatch, then one optimizer update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from srft_jax.batch import Batch, Metrics, TrainState
from srft_jax.config import Objective
from srft_jax.models.decoder import Params
from srft_jax.objectives import loss as losses
from srft_jax.ops.rounding import ROUND_AS_WRITTEN
from srft_jax.training import metrics
from srft_jax.training.microbatch import (
    FixedParams,
    ForwardOptions,
    LossFn,
    StepInputs,
    make_loss_fn,
)


class TrainStep(Protocol):
    """A jitted update; `fixed` is empty for full training without a reference."""

    def __call__(
        self, state: TrainState, batch: Batch, fixed: FixedParams = ...
    ) -> tuple[TrainState, Metrics]: ...


def _accumulate(
    loss_fn: LossFn, inputs: StepInputs, term: Array | None = None
) -> tuple[Array, Metrics, Params]:
    """Loss, metrics and gradient (float32), summed over the microbatches in use."""

    def share(params: Params, i: Array) -> tuple[Array, Metrics]:
        loss, tokens = loss_fn(params, inputs, i, term)
        return loss, metrics.microbatch_metrics(*tokens)

    params = inputs.state.params
    value_and_grad = jax.value_and_grad(share, has_aux=True)

    def add_microbatch(
        i: Array, total: tuple[Array, Metrics, Params]
    ) -> tuple[Array, Metrics, Params]:
        (loss, part), gradient = value_and_grad(params, i)
        total_loss, so_far, total_gradient = total
        return (
            total_loss + loss,
            metrics.combine(so_far, part),
            jax.tree.map(jnp.add, total_gradient, gradient),
        )

    names = jax.eval_shape(share, params, 0)[1]  # the objective's metrics; nothing is computed
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    start = (jnp.float32(0.0), metrics.initial_metrics(names), zeros)
    return jax.lax.fori_loop(0, inputs.batch.num_microbatches, add_microbatch, start)


def make_train_step(
    options: ForwardOptions,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    optimizer_name: str = "policy",
) -> TrainStep:
    """Return a jitted `train_step(state, batch, fixed=FixedParams()) -> (state, metrics)`; the
    state is donated, parameters in `fixed` are not.

    An update whose loss or gradient is not finite is skipped: only the state's step changes, and
    the metric `loss/skipped` is 1. With adapters the state has them alone, and `fixed.frozen` all
    other parameters. Without a reference for its KL, an objective raises a ValueError as the step
    is traced.

    Args:
        options: Architecture, runtime, temperature, memory for logits.
        objective: Coefficients of the loss.
        optimizer: Optimizer of the state's parameters.
        optimizer_name: Name of the optimizer's state in `TrainState.optimizer_states`.
    """
    loss_fn = make_loss_fn(options, objective)

    @jax.named_scope("optimizer")
    def update(state: TrainState, gradient: Params) -> TrainState:
        updates, optimizer_state = optimizer.update(
            gradient, state.optimizer_states[optimizer_name], state.params
        )
        return dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            optimizer_states=state.optimizer_states | {optimizer_name: optimizer_state},
        )

    def train_step(
        state: TrainState, batch: Batch, fixed: FixedParams = FixedParams()
    ) -> tuple[TrainState, Metrics]:
        loss, totals, gradient = _accumulate(loss_fn, StepInputs(state, batch, fixed))
        norm = optax.tree.norm(gradient)
        step_metrics = metrics.step_metrics(totals, batch.normalisers, objective)
        new_state = _with_entropies(update(state, gradient), step_metrics, batch)
        # One number that is not finite makes the norm so; then every leaf stays bit for bit.
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new_state, state)
        return dataclasses.replace(new_state, step=state.step + 1), step_metrics | {
            "loss/total": loss,
            "loss/gradient_norm": norm,
            "loss/skipped": 1.0 - is_finite,
        }

    return jax.jit(train_step, donate_argnames=("state",), compiler_options=ROUND_AS_WRITTEN)


def _with_entropies(state: TrainState, step_metrics: Metrics, batch: Batch) -> TrainState:
    """The state with this step's mean entropies; a role without tokens keeps the one it had."""
    counts = batch.normalisers
    return dataclasses.replace(
        state,
        entropy_self=jnp.where(
            counts.self_tokens > 0, step_metrics["policy/entropy_self"], state.entropy_self
        ),
        entropy_demonstration=jnp.where(
            counts.demonstration_tokens > 0,
            step_metrics["policy/entropy_demo"],
            state.entropy_demonstration,
        ),
    )


def make_gradient_norms(
    options: ForwardOptions, objective: Objective
) -> Callable[[StepInputs], Metrics]:
    """Return `inputs -> {"loss/<term>_gradient_norm": norm of that term's gradient alone}`.

    One compiled function runs once for each term, and costs as much as a train step each time.
    Arguments and errors are those of `make_train_step`.
    """
    loss_fn = make_loss_fn(options, objective)

    @functools.partial(jax.jit, compiler_options=ROUND_AS_WRITTEN)  # as the step that it explains
    def gradient_norm(inputs: StepInputs, term: Array) -> Array:
        return optax.tree.norm(_accumulate(loss_fn, inputs, term)[2])

    def gradient_norms(inputs: StepInputs) -> Metrics:
        _, tokens = jax.eval_shape(loss_fn, inputs.state.params, inputs, 0, None)
        names = sorted(jax.eval_shape(losses.loss_terms, *tokens))
        return {
            f"loss/{name}_gradient_norm": gradient_norm(inputs, number)
            for number, name in enumerate(names)
        }

    return gradient_norms
