"""Scores and their gradients where some queries meet some keys, for the kernels by XLA."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from srft_jax.ops.attention_terms import MASKED, ScoreOptions
from srft_jax.ops.layers import softcapped


def matmul(subscripts: str, a: Array, b: Array) -> Array:
    """Return einsum(subscripts, a, b), accumulated in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def masked_scores(
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    options: ScoreOptions,
) -> Float[Array, "B K GT S"]:
    """Return the scores, float32, `MASKED` where the mask is False.

    They are scaled in float32: a query scaled before the product would be rounded once more.
    """
    scores = matmul("bkqh,bksh->bkqs", query, key) * options.scale
    scores = softcapped(scores, options.softcap)
    batch, num_kv_heads, _, num_keys = scores.shape
    by_query = scores.reshape(batch, num_kv_heads, -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], by_query, MASKED).reshape(scores.shape)


def mean_gradient(out: Array, d_out: Array) -> Float[Array, "B K GT"]:
    """Return sum(dO O): the gradient by a weight, averaged over the weights of a query."""
    return jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)


def score_gradients(
    query: Float[Array, "B K GT H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    mean: Float[Array, "B K GT"],
    lse: Float[Array, "B K GT"],
    d_out: Float[Array, "B K GT H"],
    options: ScoreOptions,
) -> tuple[Array, Array, Array]:
    """Return the gradients by query, key and value, float32, through the scores of these keys.

    With P the weights, dP = dO v^T, a the scale, S the scores and c their cap:
    dS = a P (dP - sum(dO O)) (1 - (S / c)^2),  dq = dS k,  dk = dS^T q,  dv = P^T dO.
    """
    scores = masked_scores(query, key, mask, options)
    weights = jnp.exp(scores - lse[..., None])
    d_value = matmul("bkqs,bkqh->bksh", weights.astype(value.dtype), d_out)
    d_weights = matmul("bkqh,bksh->bkqs", d_out, value)
    d_scores = weights * (d_weights - mean[..., None]) * options.scale
    if options.softcap is not None:
        # A masked score lies far outside of the cap. Its weight is 0, and 0 * inf would be NaN.
        d_scores *= 1 - jnp.square(jnp.maximum(scores, -options.softcap) / options.softcap)
    d_scores = d_scores.astype(query.dtype)
    d_query = matmul("bkqs,bksh->bkqh", d_scores, key)
    return d_query, matmul("bkqs,bkqh->bksh", d_scores, query), d_value
