"""The loss of one microbatch: a forward pass, the head, and the objective."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Shaped

from srft_jax.batch import Batch, Rows, TrainState
from srft_jax.config import ModelConfig, Objective
from srft_jax.mesh import constrained, context_parts
from srft_jax.models import lora
from srft_jax.models.decoder import Params, Runtime, forward
from srft_jax.objectives import loss as losses
from srft_jax.ops.context import joined_rows, split_rows
from srft_jax.ops.head import Reference, token_loss


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How the trainer computes log-probs: what all of its programs are compiled with.

    Attributes:
        model_config: Architecture, with its adapters if any; the reference has the same without.
        runtime: Precision, rematerialisation and attention kernel.
        temperature: Temperature that the rollouts were sampled at.
        logits_mib: Memory for tiles of logits on each device.
    """

    model_config: ModelConfig
    runtime: Runtime
    temperature: float
    logits_mib: int


class FixedParams(NamedTuple):
    """Parameters that a step reads and does not change, in any dtype.

    They are arguments of a program: as constants they would be part of it.
    """

    frozen: Params = {}  # with adapters, all other parameters of the policy
    reference: Params | None = None  # for a KL; without adapters, may be `frozen` itself


class StepInputs(NamedTuple):
    """All that a train step reads."""

    state: TrainState
    batch: Batch
    fixed: FixedParams


class Tokens(NamedTuple):
    """What loss terms and metrics are made of: the tokens of a microbatch, flat, in the order of
    `rows_of`."""

    stats: losses.Stats
    rows: Rows
    context: losses.LossContext


# (trained params, inputs, i, term) -> share of microbatch i in the step's loss, and its tokens.
# Without a `term` the loss is that of all terms; with one it is that of the term of this number, in
# the order of their names.
LossFn = Callable[[Params, StepInputs, Array, Array | None], tuple[Array, Tokens]]


def rows_of(batch: Batch, i: int | Array) -> Rows:
    """Return microbatch i of rows [M, B, T] as [B, T]; where the mesh in context splits each row
    over n devices, as [n B, T / n], a row for each part."""
    parts = context_parts()

    def microbatch(x: Shaped[Array, "M B T"]) -> Shaped[Array, "nB Tn"]:
        rows = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return rows if parts == 1 else constrained(split_rows(rows, parts), ("rows", None))

    return jax.tree.map(microbatch, batch.rows)


def in_batch_order(tokens: Any, batch: Batch) -> Any:
    """Return a tree of flat arrays [N], in the order of `rows_of`, as rows [B, T] of the batch."""
    parts = context_parts()

    def joined(x: Shaped[Array, " N"]) -> Shaped[Array, "B T"]:
        rows = x.reshape(-1, batch.rows.tokens.shape[2] // parts)
        return rows if parts == 1 else constrained(joined_rows(rows, parts), ("batch", None))

    return jax.tree.map(joined, tokens)


def hidden_and_head(
    params: Params, model_config: ModelConfig, rows: Rows, runtime: Runtime
) -> tuple[Float[Array, "N D"], Float[Array, "D V"]]:
    """Return the last hidden states of a microbatch, flat, and the head that goes with them.

    A tied head is the embedding as it is stored, [V, D]: call the head with `transposed`.
    """
    hidden = forward(
        params,
        model_config,
        tokens=rows.tokens,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        runtime=runtime,
        parts=context_parts(),
    ).hidden
    head = params["embedding" if model_config.tie_embeddings else "head"]
    return hidden.reshape(-1, hidden.shape[-1]), head


def _loss_of_tokens(context: losses.LossContext, term: Array | None) -> Callable[..., Array]:
    """(stats, rows) -> loss of each token: of all terms, or of the term of this number alone."""
    if term is None:
        return lambda stats, rows: losses.token_objective(stats, rows, context)

    def one_term(stats: Any, rows: Rows) -> Array:
        terms = jax.eval_shape(lambda: losses.loss_terms(stats, rows, context))

        def branch(name: str) -> Callable[[], Array]:
            return lambda: losses.loss_terms(stats, rows, context)[name]

        # Not a sum with weights of 0 and 1: zero times a term that is not finite is not zero.
        return jax.lax.switch(term, [branch(name) for name in sorted(terms)])

    return one_term


def make_loss_fn(options: ForwardOptions, objective: Objective) -> LossFn:
    """Return the loss function of one microbatch.

    Its value is the microbatch's share of the step's loss, as the normalisers are the whole step's:
    the shares of all microbatches add up to it.

    Args:
        options: Architecture, runtime, temperature, memory for logits.
        objective: Coefficients of the loss. The function raises a ValueError where they need a
            reference and there is none.
    """
    model_config, runtime = options.model_config, options.runtime
    reference_config = lora.base(model_config)

    def loss_fn(
        params: Params, inputs: StepInputs, i: Array, term: Array | None = None
    ) -> tuple[Array, Tokens]:
        state, batch, fixed = inputs
        reference_params = _used_reference(objective, fixed.reference)
        rows = rows_of(batch, i)
        flat = jax.tree.map(lambda x: x.reshape(-1), rows)  # [B, T] -> [N], as the head takes them
        context = losses.LossContext(
            normalisers=batch.normalisers,
            entropy_self=state.entropy_self,
            entropy_demonstration=state.entropy_demonstration,
            objective=objective,
            on_policy=batch.on_policy,
        )
        reference = None
        if reference_params is not None:
            reference = Reference(
                *hidden_and_head(reference_params, reference_config, rows, runtime)
            )
        policy_params = lora.whole(fixed.frozen, params)
        hidden, head = hidden_and_head(policy_params, model_config, rows, runtime)
        with jax.named_scope("head"):
            loss, stats = token_loss(
                hidden,
                head,
                flat,
                _loss_of_tokens(context, term),
                temperature=options.temperature,
                softcap=model_config.logit_softcap,
                elementwise=objective.is_elementwise,
                reference=reference,
                transposed=model_config.tie_embeddings,
                frozen=bool(fixed.frozen),
                logits_bytes=options.logits_mib * 2**20,
            )
        return loss, Tokens(stats, flat, context)

    return loss_fn


def _used_reference(objective: Objective, reference_params: Params | None) -> Params | None:
    """The parameters of the reference; None for an objective without a KL, such as that of an SFT
    stage, which would pay for a second forward pass."""
    if objective.uses_reference and reference_params is None:
        raise ValueError(
            f"the objective's kl = {objective.kl} is taken to a reference policy, "
            "but there are no reference_params"
        )
    return reference_params if objective.uses_reference else None
