"""Small packed rows, and attention over them with every score, for autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.ops.attention import ScoreOptions

B, HEADS, KV_HEADS, H = 2, 4, 2, 6
OPTIONS = ScoreOptions(H**-0.5)


def problem(length, dtype=np.float32, mean_segment=5):
    """Queries, keys, values and segment ids: segments of a few tokens, padding at the end."""
    random = np.random.default_rng(length)
    shapes = (B, length, HEADS, H), (B, KV_HEADS, length, H), (B, KV_HEADS, length, H)
    arrays = [random.normal(size=shape).astype(dtype) for shape in shapes]
    starts = random.random((B, length)) < 1 / mean_segment
    return *arrays, np.where(np.arange(length) < length - 3, 1 + starts.cumsum(axis=1), 0)


def by_mask(query, key, value, segment_ids, options=OPTIONS, window=None):
    """Packed attention with every score, for autodiff."""
    key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (key, value))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    ages = np.arange(segment_ids.shape[1])[:, None] - np.arange(segment_ids.shape[1])
    seen = same & (ages >= 0) & (ages < (window or 1000))
    scores = jnp.einsum("btnh,bnsh->bnts", query, key) * options.scale
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bnsh->btnh", weights, value)


def with_gradients(function, *inputs):
    """((a sum, outputs), gradients by query, key and value) of an attention function."""
    *arrays, segment_ids = inputs

    def total(*arrays):
        out = function(*arrays, segment_ids)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
