"""Grouped-query attention over masks given as data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Far below any real score, finite: a row that may see nothing (padding) gives a mean of values,
# never a NaN.
_MASKED = -1e30


def packed_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Query t sees key s if s <= t and both are of one segment.

    In: segment_ids [1, 1, 2].  Out: [[1, 0, 0], [1, 1, 0], [0, 0, 1]].
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v in float32; query head n reads kv head n // (N / K)."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    per_kv = num_heads // num_kv_heads
    grouped = query.reshape(batch, length, num_kv_heads, per_kv, head_dim)
    # [B, K, per_kv * T, H]: the queries that share a kv head are one matmul.
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(
        batch, num_kv_heads, per_kv * length, head_dim
    )
    scores = jnp.einsum("bkqh,bksh->bkqs", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, num_kv_heads, per_kv, length, -1) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(
        value.dtype
    )
    weights = weights.reshape(batch, num_kv_heads, per_kv * length, -1)
    out = jnp.einsum("bkqs,bksh->bkqh", weights, value).reshape(
        batch, num_kv_heads, per_kv, length, head_dim
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)
