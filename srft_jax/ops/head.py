"""Log-probability and entropy of next tokens, from hidden states.

The logits [N, V] are never stored: forward and backward, rows go through in chunks of [C, V] such
that one chunk fits `LOGITS_BYTES`. With z = logits / temperature, per row:

    logprob = z[target] - logsumexp(z)            entropy = logsumexp(z) - sum_v p_v z_v
    d logprob / dz_v = [v = target] - p_v         d entropy / dz_v = -p_v (log p_v + entropy)
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

LOGITS_BYTES = 32 * 2**20

Implementation = Literal["auto", "xla"]


class TokenStats(NamedTuple):
    """float32; zeros on masked rows."""

    logprob: Float[Array, " N"]
    entropy: Float[Array, " N"]


class _Chunk(NamedTuple):
    """What a chunk of rows knows before its logits."""

    hidden: Float[Array, "C D"]
    targets: Int[Array, " C"]
    mask: Bool[Array, " C"]
    temperature: Float[Array, " C"]


def token_stats(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " N"],
    *,
    mask: Bool[Array, " N"] | None = None,
    temperature: float | Float[Array, " N"] = 1.0,
    softcap: float | None = None,
    implementation: Implementation = "auto",
) -> TokenStats:
    """Log-prob of `targets` and entropy of the next-token distribution, in nats; differentiable
    through both.

    Args:
        hidden: After the final norm. Multiplied with the head in its own dtype, accumulated in
            float32.
        head: Output head.
        targets: Token ids.
        mask: Rows that count; the others give 0 and get no gradient.
        temperature: Divides the logits; scalar or one per row; above 0; gets no gradient.
        softcap: logits = softcap * tanh(logits / softcap), before the temperature.
        implementation: "xla"; "auto" chooses it everywhere.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(f"implementation {implementation!r} is not one of 'auto', 'xla'")
    num_rows = hidden.shape[0]
    rows = _Chunk(
        hidden=hidden,
        targets=targets,
        mask=jnp.ones(num_rows, bool) if mask is None else mask,
        temperature=jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (num_rows,)),
    )
    return _stats(rows, head, softcap)


def token_loss(
    hidden: Float[Array, "N D"],
    head: Float[Array, "D V"],
    rows: Any,
    objective: Callable[[TokenStats, Any], Float[Array, " N"]],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], TokenStats]:
    """Sum of `objective(stats, rows)`, a loss per token from its log-prob and entropy, and the
    statistics.

    Args:
        hidden: After the final norm.
        head: Output head.
        rows: Per-token data with `targets` and `loss_mask` [N]; the rest is the objective's.
        objective: Per-token loss, already weighted and normalised; zero where nothing is trained.
        temperature: That the rollouts were sampled at.
    """
    stats = token_stats(hidden, head, rows.targets, mask=rows.loss_mask, temperature=temperature)
    return jnp.sum(objective(stats, rows)), stats


def _rows_per_chunk(num_rows: int, vocab_size: int) -> int:
    """Most rows whose float32 logits fit the budget. In: 4096 rows of 151,936. Out: 55."""
    return max(1, min(num_rows, LOGITS_BYTES // (4 * vocab_size)))


def _split(x: Array, size: int, fill: float = 0) -> Array:
    """[N, ...] -> [chunks, size, ...]; chunk c takes rows c, c + chunks, c + 2 chunks, ...

    Strided, because rows are sharded in order: each chunk then has rows of every device. A chunk of
    neighbouring rows would lie on one device, and all the others would compute it too.
    """
    padding = -x.shape[0] % size
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, num_rows: int) -> Array:
    """Undoes `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:num_rows]


def _chunked(rows: _Chunk, size: int) -> _Chunk:
    """[N, ...] -> [chunks, size, ...], padded with masked rows."""
    return _Chunk(
        _split(rows.hidden, size),
        _split(rows.targets, size),
        _split(rows.mask, size, False),
        _split(rows.temperature, size, 1),
    )


def _logits(chunk: _Chunk, head: Array, softcap: float | None) -> tuple[Array, Array]:
    """Tempered logits z [C, V], and dz/dlogits."""
    raw = jnp.dot(chunk.hidden, head.astype(chunk.hidden.dtype), preferred_element_type=jnp.float32)
    scale = 1.0 / chunk.temperature[:, None]
    if softcap is None:
        return raw * scale, scale
    squashed = jnp.tanh(raw / softcap)
    return softcap * squashed * scale, (1.0 - jnp.square(squashed)) * scale


def _chunk_stats(chunk: _Chunk, head: Array, softcap: float | None) -> tuple[TokenStats, Array]:
    z, _ = _logits(chunk, head, softcap)
    shifted = z - jnp.max(z, axis=-1, keepdims=True)
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1)
    log_total = jnp.log(total)
    target = jnp.take_along_axis(shifted, chunk.targets[:, None], axis=-1)[:, 0]
    # sum_v p_v z_v on shifted logits: all terms are <= 0, so nothing cancels.
    entropy = log_total - jnp.sum(exponentials * shifted, axis=-1) / total
    lse = log_total + jnp.max(z, axis=-1)
    return TokenStats(
        jnp.where(chunk.mask, target - log_total, 0.0), jnp.where(chunk.mask, entropy, 0.0)
    ), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stats(rows: _Chunk, head: Array, softcap: float | None) -> TokenStats:
    return _stats_forward(rows, head, softcap)[0]


def _stats_forward(rows: _Chunk, head: Array, softcap: float | None) -> tuple[TokenStats, Any]:
    num_rows = rows.targets.shape[0]
    chunks = _chunked(rows, _rows_per_chunk(num_rows, head.shape[1]))
    stats, lse = jax.lax.map(lambda chunk: _chunk_stats(chunk, head, softcap), chunks)
    flat = TokenStats(*(_join(x, num_rows) for x in stats))
    return flat, (rows, head, flat.entropy, _join(lse, num_rows))


def _stats_backward(
    softcap: float | None, saved: Any, cotangent: TokenStats
) -> tuple[_Chunk, Array]:
    rows, head, entropy, lse = saved
    num_rows = rows.targets.shape[0]
    size = _rows_per_chunk(num_rows, head.shape[1])
    chunks = _chunked(rows, size)
    per_row = [_split(x, size) for x in (*cotangent, entropy, lse)]

    def chunk_gradient(d_head: Array, inputs: tuple[_Chunk, list[Array]]) -> tuple[Array, Array]:
        chunk, (d_logprob, d_entropy, entropy, lse) = inputs
        z, dz = _logits(chunk, head, softcap)
        logp = z - lse[:, None]
        p = jnp.exp(logp)
        d_logprob = jnp.where(chunk.mask, d_logprob, 0.0)[:, None]
        d_entropy = jnp.where(chunk.mask, d_entropy, 0.0)[:, None]
        onehot = jax.nn.one_hot(chunk.targets, z.shape[-1], dtype=jnp.float32)
        d_raw = d_logprob * (onehot - p) - d_entropy * p * (logp + entropy[:, None])
        d_raw = (d_raw * dz).astype(chunk.hidden.dtype)
        d_head = d_head + jnp.dot(chunk.hidden.T, d_raw, preferred_element_type=jnp.float32)
        return d_head, jnp.dot(
            d_raw, head.astype(d_raw.dtype).T, preferred_element_type=jnp.float32
        )

    d_head, d_hidden = jax.lax.scan(
        chunk_gradient, jnp.zeros(head.shape, jnp.float32), (chunks, per_row)
    )
    d_hidden = _join(d_hidden, num_rows).astype(rows.hidden.dtype)
    no_gradient: Any = np.zeros((num_rows,), jax.dtypes.float0)
    d_rows = _Chunk(d_hidden, no_gradient, no_gradient, jnp.zeros_like(rows.temperature))
    return d_rows, d_head.astype(head.dtype)


_stats.defvjp(_stats_forward, _stats_backward)
