"""Log-probability and entropy of next tokens, and a loss of both, from hidden states.

The logits [N, V] are never stored. Blocks of rows go through in two sweeps over tiles of the
vocabulary: the first makes the statistics, the second the gradient (ops/head_sweeps.py). Counting a
product of all rows with the whole head as one unit:

    two sweeps     logits | logits again, d_hidden, d_head      4 units
    single sweep   logits | (kept)        d_hidden, d_head      3 units

A single sweep needs memory for the logits of a block over the whole vocabulary, and a loss of a
token that depends on that token alone, so that its gradient is known before the next block. Memory
is one budget of bytes; ops/head_passes.py says how it is spent.

Masked rows never reach a block and cost nothing. On a mesh (`jax.set_mesh`) rows are split over
`data` and `fsdp`, the vocabulary over `tensor`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops import head_passes as passes
from srft_jax.ops.head_passes import LOGITS_BYTES, Inputs, Options

Implementation = Literal["auto", "xla"]


class TokenStats(NamedTuple):
    """float32 [N], in nats; zeros on masked rows."""

    logprob: Float[Array, " N"]
    entropy: Float[Array, " N"]


class ReferencedStats(NamedTuple):
    """float32 [N], in nats; zeros on masked rows. q is the reference policy."""

    logprob: Float[Array, " N"]
    entropy: Float[Array, " N"]
    reference_logprob: Float[Array, " N"]  # log q of the target; takes no gradient
    kl: Float[Array, " N"]  # sum_v p_v (log p_v - log q_v)


class Reference(NamedTuple):
    """Another policy's hidden states and head, on the same rows; takes no gradient."""

    hidden: Any  # [N, D]
    head: Any  # [D, V]


def token_stats(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    mask: Bool[Array, " N"] | None = None,
    temperature: float | Float[Array, " N"] = 1.0,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    transposed: bool = False,
    logits_bytes: int = LOGITS_BYTES,
) -> TokenStats:
    """Log-prob of `targets` and entropy of the next-token distribution, in nats; differentiable
    through both.

    Args:
        hidden: After the final norm. Multiplied with the head in its own dtype, accumulated in
            float32.
        head: Output head.
        targets: Token ids.
        mask: Rows that count; the others give 0, get no gradient and cost nothing.
        temperature: Divides the logits; scalar or one per row; above 0; gets no gradient.
        softcap: logits = softcap * tanh(logits / softcap), before the temperature.
        implementation: "xla"; "auto" chooses it everywhere.
        transposed: The head is given as [V, D], as a tied embedding is stored.
        logits_bytes: Memory for tiles of logits on each device.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(f"implementation {implementation!r} is not one of 'auto', 'xla'")
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    inputs = _inputs(hidden, head, targets, mask, temperature, None)
    return TokenStats(*_stats(inputs, Options(softcap, transposed, logits_bytes)))


def token_loss(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    rows: Any,
    objective: Callable[[Any, Any], Float[Array, " N"]],
    *,
    temperature: float | Float[Array, " N"] = 1.0,
    softcap: float | None = None,
    elementwise: bool = True,
    reference: Reference | None = None,
    transposed: bool = False,
    frozen: bool = False,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[Float[Array, ""], Any]:
    """Sum of `objective(stats, rows)`, a loss per token, and the statistics, without gradient.

    Args:
        hidden: After the final norm.
        head: Output head.
        rows: A pytree of arrays [N, ...] with `targets` and `loss_mask`; the rest is the
            objective's.
        objective: (stats, rows) -> loss per token, already weighted and normalised; what it gives
            on rows outside `loss_mask` is not counted.
        temperature: That the rollouts were sampled at.
        softcap: As in `token_stats`.
        elementwise: A token's loss depends on its own statistics and row alone, so the objective
            may be called with any part of the rows, in any order.
        reference: Another policy; the statistics are then `ReferencedStats`.
        transposed: The heads are given as [V, D].
        frozen: The head takes no gradient, and none is made: a unit less, and no [D, V] in memory.
        logits_bytes: Memory for tiles of logits on each device.
    """
    inputs = _inputs(hidden, head, rows.targets, rows.loss_mask, temperature, reference)
    options = Options(softcap, transposed, logits_bytes, frozen)
    if not elementwise:
        stats = _named(_stats(inputs, options))
        loss = jnp.sum(jnp.where(inputs.mask, objective(stats, rows), 0.0))
        return loss, jax.lax.stop_gradient(stats)

    def of_block(outputs: tuple[Array, ...], rows: Any) -> Float[Array, " R"]:
        return objective(_named(outputs), rows)

    rows = jax.tree.map(jnp.asarray, rows)
    result = passes.loss_and_gradient(of_block, jax.lax.stop_gradient(inputs), rows, options)
    loss = _with_gradient(hidden, head, result.loss, result.d_hidden, result.d_head)
    return loss, _named(passes.outputs_of(result.stats))


def _inputs(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    temperature: float | Array,
    reference: Reference | None,
) -> Inputs:
    other = Reference(None, None) if reference is None else jax.lax.stop_gradient(reference)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    # NumPy's arrays cannot be indexed by what is traced.
    return jax.tree.map(
        jnp.asarray, Inputs(hidden, head, other.hidden, other.head, targets, mask, temperature)
    )


def _named(outputs: tuple[Array, ...]) -> TokenStats | ReferencedStats:
    return TokenStats(*outputs) if len(outputs) == 2 else ReferencedStats(*outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stats(inputs: Inputs, options: Options) -> tuple[Array, ...]:
    return _stats_forward(inputs, options)[0]


def _stats_forward(inputs: Inputs, options: Options) -> tuple[tuple[Array, ...], Any]:
    stats = passes.statistics(inputs, options).stats
    return passes.outputs_of(stats), (inputs, stats)


def _stats_backward(options: Options, saved: Any, cotangents: tuple[Array, ...]) -> tuple[Inputs]:
    inputs, stats = saved
    result = passes.gradient(inputs, stats, cotangents, options)
    none: Any = None  # no gradient
    of_hidden = result.d_hidden.astype(inputs.hidden.dtype)
    of_head = none if options.frozen else result.d_head.astype(inputs.head.dtype)
    return (Inputs(of_hidden, of_head, none, none, none, none, none),)


_stats.defvjp(_stats_forward, _stats_backward)


@jax.custom_vjp
def _with_gradient(
    hidden: Array, head: Array, loss: Array, d_hidden: Array, d_head: Array | None
) -> Float[Array, ""]:
    """`loss`; its gradient by hidden and head is known already. A frozen head has none."""
    return loss


def _with_gradient_forward(
    hidden: Array, head: Array, loss: Array, d_hidden: Array, d_head: Array | None
) -> tuple[Array, tuple[Array, Array | None]]:
    d_head = None if d_head is None else d_head.astype(head.dtype)
    return loss, (d_hidden.astype(hidden.dtype), d_head)


def _with_gradient_backward(
    gradients: tuple[Array, Array | None], cotangent: Array
) -> tuple[Any, ...]:
    d_hidden, d_head = jax.tree.map(lambda x: cotangent.astype(x.dtype) * x, gradients)
    return d_hidden, d_head, None, None, None


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)
