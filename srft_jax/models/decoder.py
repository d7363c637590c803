"""The decoder: blocks, used purely, behind `init_params`, `forward`, `output_head`.

Parameters are a nested dict with layers stacked on axis 0. Training scans the block over the
layers, so compile time does not grow with depth. With a KV cache the layers are unrolled, so that
each layer's cache is a buffer of its own that XLA reads and updates in place; a scan would copy
it.
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

# Cosines and sines [B, T, H / 2] of new tokens: of all layers, or of those that see everything and
# of those that slide.
Rotary = tuple[tuple[Array, Array], ...]

# What `remat="dots"` keeps of a block: all that costs a matmul to compute again. "offload" keeps
# most of it in the host's memory, and what each block starts from.
_DOTS = ("query", "key", "value", "attention", "attention_lse", "middle", "gate", "up")
_BLOCK_INPUT = "block_input"
# Stay on the device: splash attention names its normalisers "attention" too, and libtpu cannot lay
# these out on the host.
_NOT_OFFLOADED = ["attention", "attention_lse"]
HOST_MEMORY = "pinned_host"  # as JAX calls what an accelerator can copy to and from by itself


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a forward pass is computed; the result is the same up to rounding.

    Attributes:
        dtype: Of activations and matmul inputs.
        remat: What of a block the backward pass computes again: none of it, all but the matmuls
            (dots), whose results may also lie in the host's memory (offload), or the whole block.
        attention: Kernel of attention over packed rows.
    """

    dtype: str = "float32"
    remat: Literal["none", "dots", "block", "offload"] = "none"
    attention: Kernel = "xla"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """What a forward pass gives."""

    hidden: Float[Array, "B T D"]  # after the final norm, ready for the head
    cache: KVCache | None  # with the new tokens
    aux: dict[str, Array]  # extra loss terms by name


def _initializer(parameter: families.Parameter, config: ModelConfig) -> nn.initializers.Initializer:
    if parameter.init == "normal":
        return nn.initializers.normal(config.init_std)
    if parameter.init == "fan_in":  # uniform up to 1 / sqrt(in) in each layer
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
    return nn.initializers.ones if parameter.init == "ones" else nn.initializers.zeros


def init_params(model_config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters, shaped by the family's table, layers stacked on axis 0."""
    flat = {}
    for number, row in enumerate(families.parameters(model_config)):
        shape = families.stacked_shape(row, model_config)
        initializer = _initializer(row, model_config)
        flat[row.path] = initializer(jax.random.fold_in(key, number), shape, jnp.float32)
    return families.by_path(flat)


def num_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    cache: KVCache | None = None,
    runtime: Runtime = Runtime(),
    parts: int = 1,
) -> ForwardOutput:
    """Hidden states after the final norm.

    Without a cache a token attends to the earlier tokens of its segment in its row. With one, each
    row has one new token, which attends to all that the row's cache holds and to itself.

    Args:
        params: As made by `init_params`; with a cache, with a tuple of layers instead of a stack.
        model_config: Architecture.
        tokens: Ids below vocab_size.
        positions: Rotary position of each token, from 0 in each sequence.
        segment_ids: 0 for padding; equal ids within a row see each other. Not read with a cache.
        cache: Of earlier tokens, with room for one more in its recent part; T is 1.
        runtime: Precision and rematerialisation.
        parts: That each row is split into, which are then the rows; see ops/context.py.
    """
    rotary = rotary_of(model_config, positions)
    if cache is not None:
        hidden, cache = forward_one(params, model_config, tokens[:, 0], rotary, cache, runtime)
        return ForwardOutput(hidden=hidden[:, None], cache=cache, aux={})
    x = _looked_up(params, model_config, tokens, runtime)
    x, _ = _forward_scanned(params, model_config, x, rotary, segment_ids, runtime, parts=parts)
    return ForwardOutput(hidden=_hidden(params, model_config, x, tokens), cache=None, aux={})


def forward_with_keys(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    runtime: Runtime = Runtime(),
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T H"], Float[Array, "L B K T H"]]:
    """`forward` without a cache, and the keys and values of all layers: what a prefill is."""
    rotary = rotary_of(model_config, positions)
    x = _looked_up(params, model_config, tokens, runtime)
    x, kept = _forward_scanned(
        params, model_config, x, rotary, segment_ids, runtime, keep_keys=True
    )
    keys, values = kept
    return _hidden(params, model_config, x, tokens), keys, values


def forward_one(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, " R"],
    rotary: Rotary,
    cache: KVCache,
    runtime: Runtime,
) -> tuple[Float[Array, "R D"], KVCache]:
    """`forward` with a cache, from rotary tables: a loop of decode steps makes them beforehand.

    In the loop XLA would compute sine and cosine again wherever a layer reads them.
    """
    x = _looked_up(params, model_config, tokens, runtime)
    x, cache = _forward_cached(params, model_config, x, rotary, cache)
    return _hidden(params, model_config, x, tokens), cache


def rotary_of(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotary:
    """Rotary tables of all kinds of layers that the model has; layers that slide take the last."""
    tables = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    if config.rope_local_theta is None:
        return (tables,)
    return tables, rope_tables(positions, config.head_dim, config.rope_local_theta)


def _looked_up(
    params: Params, config: ModelConfig, tokens: Int[Array, "*lead"], runtime: Runtime
) -> Array:
    """The residual stream [tokens, D] before the first block."""
    x = _embedded(params["embedding"][tokens.reshape(-1)].astype(runtime.dtype))
    if families.FAMILIES[config.family].scales_embedding:
        x = x * jnp.asarray(config.dim**0.5, x.dtype)  # rounded to it, as transformers has it
    return x


def _hidden(params: Params, config: ModelConfig, x: Array, tokens: Int[Array, "*lead"]) -> Array:
    """The residual stream after the last block, normed, in the tokens' shape."""
    return normed(x, params["final_norm"], config).reshape(*tokens.shape, -1)


def _embedded(x: Float[Array, "BT D"]) -> Float[Array, "BT D"]:
    """Looked up in each shard of the table for the rows of its replica, then exchanged: left to
    itself XLA gathers the rows of all replicas."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, model = split_axes(mesh, "rows", x.shape[0]), split_axes(mesh, "model", x.shape[1])
    if not rows or not model:
        return x
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
    """x after all blocks; keys and values of all layers, [L, B, K, T, H] each, where asked for."""
    block: Any = Block(config)
    options = _score_options(config)

    def layer(x: Array, weights: Params, slides: bool | Array) -> tuple[Array, tuple[Array, ...]]:
        kept: tuple[Array, ...] = ()
        x = checkpoint_name(x, _BLOCK_INPUT)
        # In a scan over layers of both kinds, the device knows which one this is.
        traced = None if isinstance(slides, bool) else slides
        window = config.sliding_window if slides is not False else None

        def attend(query: Array, key: Array, value: Array) -> Array:
            nonlocal kept
            kept = (key, value) if keep_keys else ()
            return mesh_attention(
                *(query, key, value, segment_ids, options, window),
                slides=traced,
                parts=parts,
                kernel=runtime.attention,
            )

        x = block.apply({"params": weights}, x, _rotary_of_layer(rotary, slides), attend)
        return x, kept

    if runtime.remat != "none":
        static = () if len(set(config.slides)) > 1 else (2,)
        policy = _remat_policy(runtime.remat)
        # In a scan nothing else stops XLA from keeping what should be computed again.
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False, static_argnums=static)
    if len(set(config.slides)) == 1:
        return jax.lax.scan(
            lambda x, weights: layer(x, weights, config.slides[0]), x, params["layers"]
        )
    # Which layers slide goes through the scan beside their parameters.
    slides = jnp.array(config.slides)
    return jax.lax.scan(lambda x, of: layer(x, *of), x, (params["layers"], slides))


def _remat_policy(remat: str) -> Callable[..., Any]:
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=_NOT_OFFLOADED,
            names_which_can_be_offloaded=[*sorted({*_DOTS} - {*_NOT_OFFLOADED}), _BLOCK_INPUT],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        )
    return jax.checkpoint_policies.save_only_these_names(*(_DOTS if remat == "dots" else ()))


def _score_options(config: ModelConfig) -> ScoreOptions:
    return ScoreOptions(config.attention_scale, config.attention_softcap)


def _rotary_of_layer(rotary: Rotary, slides: bool | Array) -> tuple[Array, Array]:
    if len(rotary) == 1 or isinstance(slides, bool):
        return rotary[-1 if slides is True else 0]
    full, local = rotary
    return jax.tree.map(lambda a, b: jnp.where(slides, b, a), full, local)


def _forward_cached(
    params: Params, config: ModelConfig, x: Array, rotary: Rotary, cache: KVCache
) -> tuple[Array, KVCache]:
    block: Any = Block(config, joined=families.is_joined(params["layers"][0]))
    options = _score_options(config)

    def attend(layer: int, query: Array, key: Array, value: Array) -> Array:
        nonlocal cache
        cache = _with_recent(cache, layer, key, value)
        window = config.sliding_window if config.slides[layer] else None
        return decode_attention(query[:, 0], cache, layer, options, window)

    for layer, (weights, slides) in enumerate(zip(params["layers"], config.slides, strict=True)):
        cos_sin = _rotary_of_layer(rotary, slides)
        x = block.apply({"params": weights}, x, cos_sin, functools.partial(attend, layer))
    return x, dataclasses.replace(cache, num_recent=cache.num_recent + 1)


def _with_recent(
    cache: KVCache, layer: int, key: Float[Array, "R K 1 H"], value: Float[Array, "R K 1 H"]
) -> KVCache:
    """The token at hand in column `num_recent` of a layer's recent part."""
    keys, values = list(cache.recent_keys), list(cache.recent_values)
    write, column = jax.lax.dynamic_update_slice_in_dim, cache.num_recent
    transposed = jnp.swapaxes(key, 2, 3).astype(keys[layer].dtype)
    keys[layer] = write(keys[layer], transposed, column, axis=3)
    values[layer] = write(values[layer], value.astype(values[layer].dtype), column, axis=2)
    return dataclasses.replace(cache, recent_keys=tuple(keys), recent_values=tuple(values))


def output_head(params: Params, model_config: ModelConfig) -> Float[Array, "D V"]:
    """The output head: the embedding transposed where tied."""
    return params["embedding"].T if model_config.tie_embeddings else params["head"]
