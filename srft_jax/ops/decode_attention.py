"""Attention of one new token a row to a KV cache: parts are attended apart and merged exactly.

Weights of all parts are taken relative to the highest score of the row's whole context: in bfloat16
they are then the numbers that `packed_attention` rounds, and sampler and trainer agree.
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
    """softmax(score) v over a row's prompt, own and recent tokens, or the last `window` of them.

    Query head n reads kv head n // (N / K). On a mesh, each device attends for its rows and heads;
    nothing is exchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_kv_heads = cache.keys[layer].shape[1]
    of_rows = split_axes(mesh, "rows", query.shape[0])
    of_heads = split_axes(mesh, "kv_heads", num_kv_heads)
    of_layer = _Layer(
        query.reshape(query.shape[0], num_kv_heads, -1, query.shape[-1]),
        (cache.prompt_keys[layer], cache.prompt_values[layer]),
        (cache.keys[layer], cache.values[layer]),
        (cache.recent_keys[layer], cache.recent_values[layer]),
    )
    index = _Index(cache.prompt_lengths, cache.lengths, cache.row_of_lane, cache.lane_of_row)
    attend = functools.partial(_attend_layer, options, window)
    if of_rows or of_heads:
        split, rows = PartitionSpec(of_rows, of_heads), PartitionSpec(of_rows)
        attend = jax.shard_map(
            attend,
            in_specs=(split, rows, PartitionSpec()),
            out_specs=split,
            check_vma=False,
        )
    return attend(of_layer, index, cache.num_recent).reshape(query.shape)


class _Layer(NamedTuple):
    query: Float[Array, "R K n H"]
    prompt: tuple[Array, Array]
    own: tuple[Array, Array]
    recent: tuple[Array, Array]


class _Index(NamedTuple):
    prompt_lengths: Int[Array, " P"]
    lengths: Int[Array, " R"]
    row_of_lane: Int[Array, "P G"]
    lane_of_row: Int[Array, " R"]


def _attend_layer(
    options: ScoreOptions, window: int | None, layer: _Layer, index: _Index, num_recent: Array
) -> Float[Array, "R K n H"]:
    by_lane, of_rows = functools.partial(_by_lane, index), functools.partial(_of_rows, index)
    scores_of = functools.partial(_scores, options=options)
    in_prompt, in_own, in_recent = _seen(window, layer, index, num_recent)
    completion = [(scores_of(layer.query, layer.recent, in_recent), layer.recent[1])]
    if layer.own[0].shape[-1]:
        completion.append((scores_of(layer.query, layer.own, in_own), layer.own[1]))
    # One product for the G rows of a prompt, so that its keys and values are read once.
    of_prompt = scores_of(by_lane(layer.query), layer.prompt, in_prompt)

    highest_of_prompt = jnp.max(of_prompt, axis=-1)
    highest = of_rows(highest_of_prompt)
    for scores, _ in completion:
        highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
    # An empty lane gets the maximum of some row: its own one keeps its weights finite.
    highest_by_lane = jnp.maximum(by_lane(highest), highest_of_prompt)
    mixed, total = map(of_rows, _mixed(of_prompt, highest_by_lane, layer.prompt[1]))
    for scores, values in completion:
        more, more_total = _mixed(scores, highest, values)
        mixed, total = mixed + more, total + more_total
    # Below 1 only in an idle row, whose lane may be another's: there nothing may be left of it.
    return (mixed / jnp.maximum(total, 1.0)[..., None]).astype(layer.query.dtype)


def _seen(
    window: int | None, layer: _Layer, index: _Index, num_recent: Array
) -> tuple[Bool[Array, "P Q S"], Bool[Array, "R 1 C"], Bool[Array, "1 1 U"]]:
    """Which columns of prompt, own and recent part each query sees, Q being 1 or all of a prompt.

    In: window 5, a prompt of 3, 2 own tokens, 1 recent one before the token at hand.
    Out: prompt [0, 0, 1], own [1, 1], recent [1, 1].
    """
    prompt, own, recent = (
        jnp.arange(part[0].shape[-1]) for part in (layer.prompt, layer.own, layer.recent)
    )
    in_prompt = prompt < index.prompt_lengths[:, None, None]
    in_own = own < index.lengths[:, None, None]
    in_recent = (recent <= num_recent)[None, None]
    if window is None:
        return in_prompt, in_own, in_recent
    # The oldest position in sight of each row, counted from the start of each part.
    oldest_recent = num_recent - window + 1
    oldest_own = index.lengths + oldest_recent
    oldest_prompt = index.prompt_lengths[:, None] + oldest_own[index.row_of_lane]  # [P, G]
    of_heads = layer.query.shape[2]
    oldest_prompt = jnp.repeat(oldest_prompt, of_heads, axis=1)  # of G n queries
    return (
        in_prompt & (prompt >= oldest_prompt[..., None]),
        in_own & (own >= oldest_own[:, None, None]),
        in_recent & (recent >= oldest_recent),
    )


def _by_lane(index: _Index, x: Array) -> Array:
    """[R, K, n, ...] -> [P, K, G n, ...]; an empty lane holds any row."""
    by_lane = jnp.moveaxis(x[index.row_of_lane], 2, 1)  # [P, K, G, n, ...]
    return by_lane.reshape(*by_lane.shape[:2], -1, *by_lane.shape[4:])


def _of_rows(index: _Index, x: Array) -> Array:
    """[P, K, G n, ...] -> [R, K, n, ...]"""
    lanes = index.row_of_lane.shape[1]
    by_lane = jnp.moveaxis(x.reshape(*x.shape[:2], lanes, -1, *x.shape[3:]), 2, 1)
    return by_lane.reshape(-1, *by_lane.shape[2:])[index.lane_of_row]


def _scores(
    query: Float[Array, "B K Q H"],
    part: tuple[Array, Array],
    mask: Bool[Array, "#B #Q S"],
    options: ScoreOptions,
) -> Float[Array, "B K Q S"]:
    raw = jnp.einsum("bkqh,bkhs->bkqs", query, part[0], preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], softcapped(raw * options.scale, options.softcap), MASKED)


def _mixed(
    scores: Float[Array, "B K Q S"],
    highest: Float[Array, "B K Q"],
    values: Float[Array, "B K S H"],
) -> tuple[Float[Array, "B K Q H"], Float[Array, "B K Q"]]:
    """Values weighed by exp(score - highest), and the sum of the weights. Float32."""
    weights = jnp.exp(scores - highest[..., None])
    total = jnp.sum(weights, axis=-1)
    weights = weights.astype(values.dtype)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=jnp.float32)
    return mixed, total
