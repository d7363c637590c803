"""Attention of one new token per row to a KV cache in parts, whose results are merged exactly.

A row's context has three parts: its prompt, which G rows share, its own tokens, and recent tokens,
which all rows have in the same columns. Weights of all parts are relative to the highest score of
the row's whole context: in bfloat16 they are then the numbers that `packed_attention` rounds, and
sampler and trainer agree.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from srft_jax.batch import KVCache
from srft_jax.mesh import split_axes
from srft_jax.ops.attention_terms import MASKED, ScoreOptions
from srft_jax.ops.layers import softcapped


def decode_attention(
    query: Float[Array, "R N H"],
    cache: KVCache,
    layer: int,
    options: ScoreOptions,
    window: int | None = None,
) -> Float[Array, "R N H"]:
    """Return softmax(score) v over a row's prompt, own and recent tokens.

    Query head n reads kv head n // (N / K). On a mesh, each device attends for its rows and heads;
    nothing is exchanged.

    Args:
        query: Queries of the new tokens, whose keys and values are in the cache already.
        cache: Keys and values of all layers.
        layer: Number of the layer.
        options: Scale and cap of the scores.
        window: A row sees only the last `window` tokens of its context; None lets it see all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_kv_heads = cache.keys[layer].shape[1]
    row_axes = split_axes(mesh, "rows", query.shape[0])
    head_axes = split_axes(mesh, "kv_heads", num_kv_heads)
    parts = _Parts(
        query=query.reshape(query.shape[0], num_kv_heads, -1, query.shape[-1]),
        prompt=(cache.prompt_keys[layer], cache.prompt_values[layer]),
        own=(cache.keys[layer], cache.values[layer]),
        recent=(cache.recent_keys[layer], cache.recent_values[layer]),
    )
    index = _Index(cache.prompt_lengths, cache.lengths, cache.row_of_lane, cache.lane_of_row)
    attend = functools.partial(_attend, options, window)
    if row_axes or head_axes:
        split, rows = PartitionSpec(row_axes, head_axes), PartitionSpec(row_axes)
        attend = jax.shard_map(
            attend,
            in_specs=(split, rows, PartitionSpec()),
            out_specs=split,
            check_vma=False,
        )
    return attend(parts, index, cache.num_recent).reshape(query.shape)


class _Parts(NamedTuple):
    """Queries of one layer, n per kv head, and keys [.., K, H, S] and values [.., K, S, H] by part.

    Arrays of the prompt have P as first axis, arrays of the other parts R.
    """

    query: Float[Array, "R K n H"]
    prompt: tuple[Array, Array]
    own: tuple[Array, Array]
    recent: tuple[Array, Array]


class _Index(NamedTuple):
    """Lengths of the parts, and which row is in which of a prompt's G lanes; see `KVCache`."""

    prompt_lengths: Int[Array, " P"]
    lengths: Int[Array, " R"]
    row_of_lane: Int[Array, "P G"]
    lane_of_row: Int[Array, " R"]


def _attend(
    options: ScoreOptions, window: int | None, parts: _Parts, index: _Index, num_recent: Array
) -> Float[Array, "R K n H"]:
    """Attend for one device's rows and heads."""
    by_lane, by_row = functools.partial(_by_lane, index), functools.partial(_by_row, index)
    score = functools.partial(_scores, options=options)
    in_prompt, in_own, in_recent = _seen(window, parts, index, num_recent)
    completion = [(score(parts.query, parts.recent, in_recent), parts.recent[1])]
    if parts.own[0].shape[-1]:
        completion.append((score(parts.query, parts.own, in_own), parts.own[1]))
    # One product for the G rows of a prompt, so that its keys and values are read once.
    prompt_scores = score(by_lane(parts.query), parts.prompt, in_prompt)

    highest_in_prompt = jnp.max(prompt_scores, axis=-1)
    highest = by_row(highest_in_prompt)
    for scores, _ in completion:
        highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
    # An empty lane gets the maximum of any row. The maximum of its own scores keeps its weights
    # finite.
    highest_by_lane = jnp.maximum(by_lane(highest), highest_in_prompt)
    mixed, total = map(by_row, _weighted_sums(prompt_scores, highest_by_lane, parts.prompt[1]))
    for scores, values in completion:
        more, more_total = _weighted_sums(scores, highest, values)
        mixed, total = mixed + more, total + more_total
    # Only idle rows can sum below 1, since their lane may be another row's; clamping avoids 0 / 0,
    # and nobody reads them.
    return (mixed / jnp.maximum(total, 1.0)[..., None]).astype(parts.query.dtype)


def _seen(
    window: int | None, parts: _Parts, index: _Index, num_recent: Array
) -> tuple[Bool[Array, "P Q S"], Bool[Array, "R 1 C"], Bool[Array, "1 1 U"]]:
    """Return which columns of the prompt, own and recent part each query sees.

    Q is 1, or with a window the number of a prompt's queries, G n.

    In: window 5, a prompt of 3, 2 own tokens, 1 recent one before the token at hand.
    Out: prompt [0, 0, 1], own [1, 1], recent [1, 1].
    """
    prompt, own, recent = (
        jnp.arange(part[0].shape[-1]) for part in (parts.prompt, parts.own, parts.recent)
    )
    in_prompt = prompt < index.prompt_lengths[:, None, None]
    in_own = own < index.lengths[:, None, None]
    in_recent = (recent <= num_recent)[None, None]
    if window is None:
        return in_prompt, in_own, in_recent
    # The oldest column that each row sees, counted from the start of each part. It is below 0 where
    # the row sees the whole part and more.
    oldest_recent = num_recent - window + 1
    oldest_own = index.lengths + oldest_recent
    oldest_prompt = index.prompt_lengths[:, None] + oldest_own[index.row_of_lane]  # [P, G]
    heads_per_kv_head = parts.query.shape[2]
    oldest_prompt = jnp.repeat(oldest_prompt, heads_per_kv_head, axis=1)  # [P, G n]
    return (
        in_prompt & (prompt >= oldest_prompt[..., None]),
        in_own & (own >= oldest_own[:, None, None]),
        in_recent & (recent >= oldest_recent),
    )


def _by_lane(index: _Index, x: Array) -> Array:
    """Order rows by lane, [R, K, n, ...] -> [P, K, G n, ...]; an empty lane gets any row."""
    by_lane = jnp.moveaxis(x[index.row_of_lane], 2, 1)  # [P, K, G, n, ...]
    return by_lane.reshape(*by_lane.shape[:2], -1, *by_lane.shape[4:])


def _by_row(index: _Index, x: Array) -> Array:
    """Undo `_by_lane`: [P, K, G n, ...] -> [R, K, n, ...]."""
    lanes = index.row_of_lane.shape[1]
    by_lane = jnp.moveaxis(x.reshape(*x.shape[:2], lanes, -1, *x.shape[3:]), 2, 1)
    return by_lane.reshape(-1, *by_lane.shape[2:])[index.lane_of_row]


def _scores(
    query: Float[Array, "B K Q H"],
    part: tuple[Array, Array],
    mask: Bool[Array, "#B #Q S"],
    options: ScoreOptions,
) -> Float[Array, "B K Q S"]:
    """Return scores of queries to the keys of a part, float32, `MASKED` where they see nothing."""
    raw = jnp.einsum("bkqh,bkhs->bkqs", query, part[0], preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], softcapped(raw * options.scale, options.softcap), MASKED)


def _weighted_sums(
    scores: Float[Array, "B K Q S"],
    highest: Float[Array, "B K Q"],
    values: Float[Array, "B K S H"],
) -> tuple[Float[Array, "B K Q H"], Float[Array, "B K Q"]]:
    """Return sums of values with weights exp(score - highest), and of the weights; float32."""
    weights = jnp.exp(scores - highest[..., None])
    total = jnp.sum(weights, axis=-1)
    weights = weights.astype(values.dtype)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=jnp.float32)
    return mixed, total
