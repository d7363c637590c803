"""Log-probability and entropy of next tokens, and a loss of both, from hidden states.

The logits [N, V] are never stored. Rows are cut into row tiles, the vocabulary into column tiles.
Each row tile sweeps twice over all column tiles: the first sweep makes the statistics, the second
the gradient (ops/head_sweeps.py). Counting a product of all rows with the whole head as one unit:

    two sweeps     logits | logits again, d_hidden, d_head      4 units
    single sweep   logits | (kept)        d_hidden, d_head      3 units

A single sweep needs memory for the logits of a row tile over the whole vocabulary, and a loss of a
token that depends on that token alone, so that its gradient is known before the next row tile.
Memory is one budget of bytes; ops/head_passes.py says how it is spent.

Masked rows never reach a row tile and cost nothing. On a mesh (`jax.set_mesh`) rows are split over
`data` and `fsdp`, the vocabulary over `tensor`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srft_jax.ops import head_passes as passes
from srft_jax.ops.head_passes import LOGITS_BYTES, HeadInputs, HeadOptions, HeadTileSizes


class TokenStats(NamedTuple):
    """Statistics of next-token distributions, float32 [N] in nats; zeros on masked rows.

    Attributes:
        logprob: Log-probability of the target.
        entropy: Entropy of the distribution.
    """

    logprob: Float[Array, " N"]
    entropy: Float[Array, " N"]


class ReferencedStats(NamedTuple):
    """Statistics of a policy p and a reference policy q, float32 [N] in nats; zeros on masked rows.

    Attributes:
        logprob: log p of the target.
        entropy: Entropy of p.
        reference_logprob: log q of the target; takes no gradient.
        kl: sum_v p_v (log p_v - log q_v).
    """

    logprob: Float[Array, " N"]
    entropy: Float[Array, " N"]
    reference_logprob: Float[Array, " N"]
    kl: Float[Array, " N"]


class Reference(NamedTuple):
    """Another policy's hidden states and head, on the same rows; takes no gradient.

    Attributes:
        hidden: Hidden states [N, D].
        head: Output head [D, V], or [V, D] where the policy's head is transposed.
    """

    hidden: Any
    head: Any


def token_stats(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    mask: Bool[Array, " N"] | None = None,
    temperature: float | Float[Array, " N"] = 1.0,
    softcap: float | None = None,
    transposed: bool = False,
    logits_bytes: int = LOGITS_BYTES,
    tile_sizes: HeadTileSizes = HeadTileSizes(),
) -> TokenStats:
    """Return log-probs of `targets` and entropies of the next-token distributions.

    Differentiable through both, by hidden and head.

    Args:
        hidden: Hidden states after the final norm. They are multiplied with the head in their own
            dtype, accumulated in float32.
        head: Output head.
        targets: Token ids.
        mask: Rows that count. Masked rows give 0, get no gradient and cost nothing.
        temperature: Divides the logits; a scalar or one per row, above 0; takes no gradient.
        softcap: logits = softcap * tanh(logits / softcap), before the temperature.
        transposed: Whether the head is given as [V, D], as a tied embedding is stored.
        logits_bytes: Memory for tiles of logits on each device.
        tile_sizes: Bounds on the sizes of tiles.
    """
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    inputs = _inputs(hidden, head, targets, mask, temperature, None)
    options = HeadOptions(softcap, transposed, logits_bytes, tile_sizes=tile_sizes)
    return TokenStats(*_stats(inputs, options))


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
    tile_sizes: HeadTileSizes = HeadTileSizes(),
) -> tuple[Float[Array, ""], Any]:
    """Return the sum of `objective(stats, rows)`, a loss per token, and the statistics.

    The sum is differentiable by hidden and head, the statistics take no gradient.

    Args:
        hidden: Hidden states after the final norm.
        head: Output head.
        rows: A pytree of arrays [N, ...] with `targets` and `loss_mask`; other arrays are for the
            objective.
        objective: (stats, rows) -> loss per token, already weighted and normalised. Losses of rows
            outside `loss_mask` are not counted.
        temperature: Temperature at which the rollouts were sampled.
        softcap: As in `token_stats`.
        elementwise: Whether a token's loss depends on its own statistics and row alone, so that the
            objective may be called with any part of the rows, in any order.
        reference: Another policy; the statistics are then `ReferencedStats`.
        transposed: Whether the heads are given as [V, D].
        frozen: Whether the head takes no gradient. None is made then, which saves one unit of work
            and an array [D, V].
        logits_bytes: Memory for tiles of logits on each device.
        tile_sizes: Bounds on the sizes of tiles.
    """
    inputs = _inputs(hidden, head, rows.targets, rows.loss_mask, temperature, reference)
    options = HeadOptions(softcap, transposed, logits_bytes, frozen, tile_sizes)
    if not elementwise:
        stats = _named(_stats(inputs, options))
        loss = jnp.sum(jnp.where(inputs.mask, objective(stats, rows), 0.0))
        return loss, jax.lax.stop_gradient(stats)

    def tile_objective(outputs: tuple[Array, ...], rows: Any) -> Float[Array, " R"]:
        return objective(_named(outputs), rows)

    rows = jax.tree.map(jnp.asarray, rows)
    result = passes.loss_and_gradient(tile_objective, jax.lax.stop_gradient(inputs), rows, options)
    loss = _with_gradient(hidden, head, result.loss, result.d_hidden, result.d_head)
    return loss, _named(passes.outputs_of(result.stats))


def _inputs(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    temperature: float | Array,
    reference: Reference | None,
) -> HeadInputs:
    """Put all arrays into one record, temperatures as one per row."""
    other = Reference(None, None) if reference is None else jax.lax.stop_gradient(reference)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), targets.shape)
    # NumPy arrays cannot be indexed by traced arrays.
    return jax.tree.map(
        jnp.asarray, HeadInputs(hidden, head, other.hidden, other.head, targets, mask, temperature)
    )


def _named(outputs: tuple[Array, ...]) -> TokenStats | ReferencedStats:
    return TokenStats(*outputs) if len(outputs) == 2 else ReferencedStats(*outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _stats(inputs: HeadInputs, options: HeadOptions) -> tuple[Array, ...]:
    return _stats_forward(inputs, options)[0]


def _stats_forward(inputs: HeadInputs, options: HeadOptions) -> tuple[tuple[Array, ...], Any]:
    stats = passes.statistics(inputs, options).stats
    return passes.outputs_of(stats), (inputs, stats)


def _stats_backward(
    options: HeadOptions, saved: Any, cotangents: tuple[Array, ...]
) -> tuple[HeadInputs]:
    inputs, stats = saved
    result = passes.gradient(inputs, stats, cotangents, options)
    none: Any = None  # no gradient
    d_hidden = result.d_hidden.astype(inputs.hidden.dtype)
    d_head = none if options.frozen else result.d_head.astype(inputs.head.dtype)
    return (HeadInputs(d_hidden, d_head, none, none, none, none, none),)


_stats.defvjp(_stats_forward, _stats_backward)


@jax.custom_vjp
def _with_gradient(
    hidden: Array, head: Array, loss: Array, d_hidden: Array, d_head: Array | None
) -> Float[Array, ""]:
    """Return `loss`, whose gradients by hidden and head are known already.

    A frozen head has no gradient: `d_head` is None.
    """
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
