"""The decoder as pure functions: `init_params`, three forward passes, `output_head`.

    forward            packed rows, for training and log-probs
    forward_with_keys  packed rows of prompts, and their keys and values: a prefill
    forward_one        one new token a row, over a KV cache: a decode step

Parameters are a nested dict with layers stacked on axis 0. The first two passes scan the block over
the layers, so compile time does not grow with depth. A decode step unrolls the layers, so that each
layer's cache is a buffer of its own that XLA reads and updates in place; a scan would copy it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from srft_jax.batch import KVCache
from srft_jax.config import ModelConfig
from srft_jax.mesh import split_axes
from srft_jax.models import families
from srft_jax.models.block import Block, normed
from srft_jax.ops.attention import Kernel, ScoreOptions
from srft_jax.ops.decode_attention import decode_attention
from srft_jax.ops.mesh_attention import mesh_attention
from srft_jax.ops.rope import rope_tables

Params = dict[str, Any]

# Cosines and sines [B, T, H / 2] of new tokens. One pair where all layers share it; else two, first
# for the layers that see the whole segment, then for those with a sliding window.
Rotary = tuple[tuple[Array, Array], ...]

# The arrays of a block that `remat="dots"` keeps: all that cost a matmul to compute again.
# "offload" keeps most of them in the host's memory, and the residual stream before each block.
DOTS = ("query", "key", "value", "attention", "attention_lse", "middle", "gate", "up")
_BLOCK_INPUT = "block_input"
# These stay on the device: splash attention names its normalisers "attention" too, and libtpu
# cannot lay them out on the host.
_NOT_OFFLOADED = ["attention", "attention_lse"]
HOST_MEMORY = "pinned_host"  # JAX's name for memory that an accelerator copies to by itself


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a forward pass is computed; the result is the same up to rounding.

    Attributes:
        dtype: Type of activations and matmul inputs.
        remat: What the backward pass computes again of each block: nothing (none), all but the
            matmuls (dots), the same with their results in the host's memory (offload), or
            everything (block).
        attention: The kernel for attention over packed rows.
    """

    dtype: str = "float32"
    remat: Literal["none", "dots", "block", "offload"] = "none"
    attention: Kernel = "xla"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """The result of `forward`."""

    hidden: Float[Array, "B T D"]  # after the final norm, ready for the head


def _initializer(parameter: families.Parameter, config: ModelConfig) -> nn.initializers.Initializer:
    if parameter.init == "normal":
        return nn.initializers.normal(config.init_std)
    if parameter.init == "fan_in":  # uniform up to 1 / sqrt(in) in each layer
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
    return nn.initializers.ones if parameter.init == "ones" else nn.initializers.zeros


def init_params(model_config: ModelConfig, key: Array) -> Params:
    """Draw random float32 parameters, shaped by the family's table, layers stacked on axis 0."""
    # A parameter's key depends on its place in the table alone, not on the other parameters.
    flat = {}
    for number, parameter in enumerate(families.parameters(model_config)):
        shape = families.stacked_shape(parameter, model_config)
        initializer = _initializer(parameter, model_config)
        flat[parameter.path] = initializer(jax.random.fold_in(key, number), shape, jnp.float32)
    return families.by_path(flat)


def num_params(params: Params) -> int:
    """Count the numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    runtime: Runtime = Runtime(),
    parts: int = 1,
) -> ForwardOutput:
    """Compute hidden states [B, T, D] after the final norm, from packed rows.

    A token attends to itself and to the earlier tokens of its segment in its row.

    Args:
        params: Parameters, as made by `init_params`.
        model_config: Architecture.
        tokens: Ids below vocab_size.
        positions: Rotary position of each token, from 0 in each sequence.
        segment_ids: 0 for padding; equal ids within a row see each other.
        runtime: Precision, rematerialisation and kernel.
        parts: Number of devices along the mesh axis `context`. Each row then comes cut into so many
            parts, as ops/context.py cuts it, and the B rows here are those parts.
    """
    rotary = rotary_of(model_config, positions)
    x = _embed(params, model_config, tokens, runtime)
    x, _ = _forward_scanned(params, model_config, x, rotary, segment_ids, runtime, parts=parts)
    return ForwardOutput(hidden=_final_normed(params, model_config, x, tokens))


def forward_with_keys(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    runtime: Runtime = Runtime(),
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T H"], Float[Array, "L B K T H"]]:
    """Compute what `forward` does, and return the keys and values of all layers beside it."""
    rotary = rotary_of(model_config, positions)
    x = _embed(params, model_config, tokens, runtime)
    x, (keys, values) = _forward_scanned(
        params, model_config, x, rotary, segment_ids, runtime, keep_keys=True
    )
    return _final_normed(params, model_config, x, tokens), keys, values


def forward_one(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, " R"],
    rotary: Rotary,
    cache: KVCache,
    runtime: Runtime,
) -> tuple[Float[Array, "R D"], KVCache]:
    """Compute the hidden state of one new token in each row, and append its keys to the cache.

    A token attends to all that its row's cache holds and to itself.

    Args:
        params: Parameters with a tuple of layers instead of a stack; see rollout/decode_layout.py.
        model_config: Architecture.
        tokens: Ids of the new tokens.
        rotary: Tables of their positions, T = 1. A loop of decode steps makes those of all its
            steps beforehand: in the loop XLA would compute sine and cosine again in each layer.
        cache: Keys and values of earlier tokens, with room for one more in the recent part.
        runtime: Precision.
    """
    x = _embed(params, model_config, tokens, runtime)
    x, cache = _forward_cached(params, model_config, x, rotary, cache)
    return _final_normed(params, model_config, x, tokens), cache


def rotary_of(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotary:
    """Compute rotary tables for all kinds of layers that the model has."""
    tables = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    if config.rope_local_theta is None:
        return (tables,)
    return tables, rope_tables(positions, config.head_dim, config.rope_local_theta)


def _embed(
    params: Params, config: ModelConfig, tokens: Int[Array, "*lead"], runtime: Runtime
) -> Array:
    """The residual stream [tokens, D] before the first block."""
    x = _exchanged(params["embedding"][tokens.reshape(-1)].astype(runtime.dtype))
    if families.FAMILIES[config.family].scales_embedding:
        # transformers rounds the factor to the activations' type, so it is rounded here, too.
        x = x * jnp.asarray(config.dim**0.5, x.dtype)
    return x


def _final_normed(
    params: Params, config: ModelConfig, x: Array, tokens: Int[Array, "*lead"]
) -> Array:
    """The residual stream after the last block, normed, in the tokens' shape."""
    return normed(x, params["final_norm"], config).reshape(*tokens.shape, -1)


def _exchanged(x: Float[Array, "BT D"]) -> Float[Array, "BT D"]:
    """Looked-up embeddings, whose columns lie split as the table's, brought to their rows' devices.

    Two constraints say so step by step: each shard of the table is read for the rows of its own
    replica alone, then columns are exchanged. Left to itself XLA gathers the rows of all replicas.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, model = split_axes(mesh, "rows", x.shape[0]), split_axes(mesh, "model", x.shape[1])
    if not rows or not model:
        return x
    # Axes that split rows but not the table: each replica of the table serves its own rows.
    replica = tuple(axis for axis in rows if axis not in model)
    x = jax.lax.with_sharding_constraint(x, PartitionSpec(replica, model))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, None))


def _forward_scanned(
    params: Params,
    config: ModelConfig,
    x: Array,
    rotary: Rotary,
    segment_ids: Array,
    runtime: Runtime,
    *,
    keep_keys: bool = False,
    parts: int = 1,
) -> tuple[Array, tuple[Array, ...]]:
    """x after all blocks; with `keep_keys` also keys and values, [L, B, K, T, H] each."""
    block: Any = Block(config)
    options = _score_options(config)

    def layer(x: Array, weights: Params, slides: bool | Array) -> tuple[Array, tuple[Array, ...]]:
        keys_values: tuple[Array, ...] = ()
        x = checkpoint_name(x, _BLOCK_INPUT)
        # A bool where all layers are of one kind; else an array, read on the device in the scan.
        slides_here = None if isinstance(slides, bool) else slides
        window = config.sliding_window if slides is not False else None

        def attend(query: Array, key: Array, value: Array) -> Array:
            nonlocal keys_values  # the block calls this once
            keys_values = (key, value) if keep_keys else ()
            return mesh_attention(
                query,
                key,
                value,
                segment_ids,
                options,
                window,
                slides=slides_here,
                parts=parts,
                kernel=runtime.attention,
            )

        x = block.apply({"params": weights}, x, _layer_rotary(rotary, slides), attend)
        return x, keys_values

    one_kind = len(set(config.slides)) == 1
    if runtime.remat != "none":
        layer = jax.checkpoint(
            layer,
            policy=_remat_policy(runtime.remat),
            prevent_cse=False,  # not needed: a scan keeps XLA from merging the two computations
            static_argnums=(2,) if one_kind else (),
        )
    if one_kind:
        return jax.lax.scan(
            lambda x, weights: layer(x, weights, config.slides[0]), x, params["layers"]
        )
    # Which layers slide goes through the scan beside their parameters.
    layers = (params["layers"], jnp.array(config.slides))
    return jax.lax.scan(lambda x, weights_slides: layer(x, *weights_slides), x, layers)


def _remat_policy(remat: str) -> Callable[..., Any]:
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=_NOT_OFFLOADED,
            names_which_can_be_offloaded=[*sorted({*DOTS} - {*_NOT_OFFLOADED}), _BLOCK_INPUT],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
    return jax.checkpoint_policies.save_only_these_names(*(DOTS if remat == "dots" else ()))


def _score_options(config: ModelConfig) -> ScoreOptions:
    return ScoreOptions(config.attention_scale, config.attention_softcap)


def _layer_rotary(rotary: Rotary, slides: bool | Array) -> tuple[Array, Array]:
    """The tables of one layer: the last ones where it slides, else the first."""
    if len(rotary) == 1 or isinstance(slides, bool):
        return rotary[-1 if slides is True else 0]
    full, local = rotary  # which of them, is known on the device
    return jax.tree.map(lambda whole, near: jnp.where(slides, near, whole), full, local)


def _forward_cached(
    params: Params, config: ModelConfig, x: Array, rotary: Rotary, cache: KVCache
) -> tuple[Array, KVCache]:
    """x after all blocks, and the cache with the new tokens, layer by layer."""
    block: Any = Block(config, joined=families.is_joined(params["layers"][0]))
    options = _score_options(config)

    def attend(layer: int, query: Array, key: Array, value: Array) -> Array:
        nonlocal cache
        cache = _with_recent(cache, layer, key, value)
        window = config.sliding_window if config.slides[layer] else None
        return decode_attention(query[:, 0], cache, layer, options, window)

    # Unrolled: `slides` is a plain bool here, so that a layer reads only the window it needs.
    for layer, (weights, slides) in enumerate(zip(params["layers"], config.slides, strict=True)):
        cos_sin = _layer_rotary(rotary, slides)
        x = block.apply({"params": weights}, x, cos_sin, functools.partial(attend, layer))
    return x, dataclasses.replace(cache, num_recent=cache.num_recent + 1)


def _with_recent(
    cache: KVCache, layer: int, key: Float[Array, "R K 1 H"], value: Float[Array, "R K 1 H"]
) -> KVCache:
    """The cache with new tokens in column `num_recent` of one layer's recent part."""
    keys, values = list(cache.recent_keys), list(cache.recent_values)
    write, column = jax.lax.dynamic_update_slice_in_dim, cache.num_recent
    transposed = jnp.swapaxes(key, 2, 3).astype(keys[layer].dtype)
    # Keys have their tokens in the last axis, values in the one before it; see batch.KVCache.
    keys[layer] = write(keys[layer], transposed, column, axis=3)
    values[layer] = write(values[layer], value.astype(values[layer].dtype), column, axis=2)
    return dataclasses.replace(cache, recent_keys=tuple(keys), recent_values=tuple(values))


def output_head(params: Params, model_config: ModelConfig) -> Float[Array, "D V"]:
    """Return the output head [D, V]: where tied, the embedding transposed."""
    return params["embedding"].T if model_config.tie_embeddings else params["head"]
