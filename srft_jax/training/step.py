"""The train step: forward, head and backward of each microbatch, then one optimizer update."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from srft_jax.batch import Batch, Metrics, Normalisers, Role, Rows, TrainState
from srft_jax.config import ModelConfig
from srft_jax.models.decoder import Params, Runtime, forward, output_head
from srft_jax.objectives import loss as losses
from srft_jax.objectives.methods import Objective
from srft_jax.ops.head import TokenStats, token_loss

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


# Metrics that are means over the tokens of a role; what is not here is a sum already normalised.
_MEAN_OVER = {
    "policy/entropy_self": Role.SELF,
    "policy/sampler_kl": Role.SELF,
    "policy/clip_fraction": Role.SELF,
    "weights/rl": Role.SELF,
    "policy/entropy_demo": Role.DEMONSTRATION,
    "policy/logprob_demo": Role.DEMONSTRATION,
    "weights/sft": Role.DEMONSTRATION,
}


def _sums(stats: TokenStats, rows: Rows, context: losses.LossContext) -> Metrics:
    """Sums over the tokens of a microbatch, to be divided by global counts once all are in."""
    stats = jax.lax.stop_gradient(stats)
    objective = context.objective
    entropy = losses.scoped_entropy(stats, rows, context)
    difference = stats.logprob - rows.old_logprobs
    values = {
        "policy/entropy_self": stats.entropy,
        "policy/sampler_kl": jnp.exp(difference) - 1.0 - difference,
        "weights/rl": losses.rl_weight(entropy, objective),
        "policy/entropy_demo": stats.entropy,
        "policy/logprob_demo": stats.logprob,
        "weights/sft": losses.sft_weight(entropy, objective),
    }
    if objective.self_form == "policy_gradient":
        ratio = jnp.exp(losses.log_ratio(stats, rows, context))
        values["policy/clip_fraction"] = losses.is_clipped(ratio, rows.advantage, objective)
    sums = {
        name: jnp.sum(jnp.where(rows.loss_mask & (rows.role == _MEAN_OVER[name]), value, 0.0))
        for name, value in values.items()
    }
    terms = losses.loss_terms(stats, rows, context)
    return sums | {f"loss/{name}": jnp.sum(term) for name, term in terms.items()}


def _counts(normalisers: Normalisers) -> dict[Role, Array]:
    return {
        Role.SELF: normalisers.self_tokens,
        Role.DEMONSTRATION: normalisers.demonstration_tokens,
    }


def _means(sums: Metrics, normalisers: Normalisers) -> Metrics:
    """Sums divided by the step's counts; over no tokens it is 0, and `present` leaves it out."""
    counts = {name: _counts(normalisers)[role] for name, role in _MEAN_OVER.items()}
    return {name: value / jnp.maximum(counts.get(name, 1.0), 1.0) for name, value in sums.items()}


def present(metrics: Metrics, normalisers: Normalisers) -> Metrics:
    """The metrics of roles that the batch has."""
    absent = {name for name, role in _MEAN_OVER.items() if not _counts(normalisers)[role]}
    return {name: value for name, value in metrics.items() if name not in absent}


def make_loss_fn(
    model_config: ModelConfig,
    objective: Objective,
    *,
    temperature: float,
    on_policy: bool,
    runtime: Runtime,
) -> Callable[[Params, TrainState, Batch, Array], tuple[Array, Metrics]]:
    """(params, state, batch, i) -> share of microbatch i in the step's loss, and its metric
    sums."""

    def loss_fn(params: Params, state: TrainState, batch: Batch, i: Array) -> tuple[Array, Metrics]:
        rows = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch.rows
        )
        hidden = forward(
            params, model_config, rows.tokens, rows.positions, rows.segment_ids, runtime=runtime
        ).hidden
        context = losses.LossContext(
            batch.normalisers, state.entropy_self, state.entropy_demonstration, objective, on_policy
        )
        flat = jax.tree.map(lambda x: x.reshape(-1), rows)
        loss, stats = token_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            output_head(params, model_config),
            flat,
            lambda stats, rows: losses.token_objective(stats, rows, context),
            temperature=temperature,
        )
        return loss, _sums(stats, flat, context)

    return loss_fn


def make_train_step(
    model_config: ModelConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float,
    on_policy: bool,
    runtime: Runtime = Runtime(),
) -> TrainStep:
    """A jitted `train_step(state, batch) -> (state, metrics)`; the state is donated.

    Args:
        model_config: Architecture.
        objective: Coefficients of the loss.
        optimizer: Of all parameters.
        temperature: That the rollouts were sampled at.
        on_policy: The rollouts are of the current parameters, so old log-probs are the step's own.
        runtime: Precision and rematerialisation.
    """
    loss_fn = make_loss_fn(
        model_config, objective, temperature=temperature, on_policy=on_policy, runtime=runtime
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

        def add_microbatch(
            i: Array, total: tuple[Array, Metrics, Params]
        ) -> tuple[Array, Metrics, Params]:
            (loss, sums), grads = value_and_grad(state.params, state, batch, i)
            return jax.tree.map(jnp.add, total, (loss, sums, grads))

        (loss, sums), grads = jax.eval_shape(lambda: value_and_grad(state.params, state, batch, 0))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, sums, grads))
        loss, sums, grads = jax.lax.fori_loop(0, batch.num_microbatches, add_microbatch, zeros)

        updates, optimizer_state = optimizer.update(
            grads, state.optimizer_states["policy"], state.params
        )
        counts = batch.normalisers
        metrics = _means(sums, counts) | {
            "loss/total": loss,
            "loss/gradient_norm": optax.tree.norm(grads),
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer_states=state.optimizer_states | {"policy": optimizer_state},
            # A step without tokens of a role says nothing about their entropy.
            entropy_self=jnp.where(
                counts.self_tokens > 0, metrics["policy/entropy_self"], state.entropy_self
            ),
            entropy_demonstration=jnp.where(
                counts.demonstration_tokens > 0,
                metrics["policy/entropy_demo"],
                state.entropy_demonstration,
            ),
        )
        return new_state, metrics

    return jax.jit(train_step, donate_argnames=("state",))
