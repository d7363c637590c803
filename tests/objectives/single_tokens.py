"""Rows of [N] tokens, each a sequence of its own, and the loss of each with every count 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.batch import Normalisers, Role, Rows
from srft_jax.objectives.loss import LossContext, token_objective
from srft_jax.ops.head import ReferencedStats, TokenStats

ONES = Normalisers(*[jnp.float32(1.0)] * 7)


def make_rows(size, role=Role.SELF, **fields) -> Rows:
    zeros = jnp.zeros(size, jnp.int32)
    values = dict.fromkeys(["tokens", "targets", "positions"], zeros) | dict(
        segment_ids=zeros + 1,
        sequence_ids=jnp.arange(size),
        role=zeros + role,
        loss_mask=zeros == 0,
        advantage=jnp.ones(size),
        correct=zeros == 0,
        weight=jnp.ones(size),
        old_logprobs=jnp.zeros(size),
        sampler_logprobs=jnp.zeros(size),
        inverse_length=jnp.ones(size),
    )
    return Rows(**values | {name: jnp.asarray(value) for name, value in fields.items()})


def make_context(objective, on_policy=False) -> LossContext:
    return LossContext(ONES, jnp.float32(0.0), jnp.float32(0.0), objective, on_policy)


@functools.cache
def _compiled(objective, on_policy):
    def total(logp, entropy, reference, rows):
        stats = TokenStats(logp, entropy)
        if objective.kl:
            stats = ReferencedStats(logp, entropy, reference, jnp.zeros_like(logp))
        losses = token_objective(stats, rows, make_context(objective, on_policy))
        return losses.sum(), losses

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


def values_and_gradients(objective, rows, logp, entropy, reference=0.0, on_policy=False):
    """Loss of each token, its gradient by logp and its gradient by the entropy."""
    stats = (np.broadcast_to(x, len(logp)).astype(np.float32) for x in (logp, entropy, reference))
    gradients, losses = _compiled(objective, on_policy)(*stats, rows)
    return tuple(map(np.asarray, (losses, *gradients)))
