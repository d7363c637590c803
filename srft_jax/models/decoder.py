"""The decoder: a Flax Linen block, used purely, behind `init_params`, `forward`, `output_head`.

Parameters are a nested dict with layers stacked on axis 0. Training scans the block over the
layers, so compile time does not grow with depth. With a KV cache the layers are unrolled, so that
each layer's cache is a buffer of its own that XLA updates in place; a scan would copy the whole
cache once a token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from srft_jax.batch import KVCache
from srft_jax.config import ModelConfig
from srft_jax.mesh import split_axes
from srft_jax.models import families
from srft_jax.ops.attention import attention, packed_attention
from srft_jax.ops.layers import rms_norm, rope, rope_tables

Params = dict[str, Any]

# (query [B, T, N, H], key, value [B, K, T, H]) of new tokens -> mixed values [B, T, N, H].
Attend = Callable[[Array, Array, Array], Array]

# What `remat="dots"` keeps of a block: all that costs a matmul to compute again.
_DOTS = ("query", "key", "value", "attention", "attention_lse", "middle", "gate", "up")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a forward pass is computed; the result is the same up to rounding.

    Attributes:
        dtype: Of activations and matmul inputs.
        remat: What of a block the backward pass computes again: none of it, all but the matmuls
            (dots), or the whole block.
    """

    dtype: str = "float32"
    remat: Literal["none", "dots", "block"] = "none"


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
    return nn.initializers.ones if parameter.init == "ones" else nn.initializers.zeros


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on flat tokens [B*T, D].

    Flat, because XLA contracts the two dimensions of [B, T, D] slowly in weight gradients (1.9x on
    CPU).
    """

    config: ModelConfig

    def setup(self) -> None:
        for row in families.parameters(self.config):
            if row.stacked:
                name = row.path.removeprefix("layers/")
                shape = families.shape(row, self.config)
                setattr(self, name, self.param(name, _initializer(row, self.config), shape))

    def __call__(
        self, x: Float[Array, "BT D"], cos_sin: tuple[Array, Array], attend: Attend
    ) -> Float[Array, "BT D"]:
        """x after the block.

        Args:
            x: Residual stream.
            cos_sin: Rotary tables of the new tokens, [B, T, H / 2] each.
            attend: From new queries, keys and values to mixed values.
        """
        dtype = x.dtype
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm, self.config.norm_epsilon)
            mixed = attend(*self._query_key_value(normed, cos_sin))
            x = x + mixed.reshape(x.shape[0], -1) @ self.output.astype(dtype)
            x = checkpoint_name(x, "middle")
        with jax.named_scope("mlp"):
            normed = rms_norm(x, self.mlp_norm, self.config.norm_epsilon)
            gate = checkpoint_name(normed @ self.gate.astype(dtype), "gate")
            up = checkpoint_name(normed @ self.up.astype(dtype), "up")
            return x + (nn.silu(gate) * up) @ self.down.astype(dtype)

    def _query_key_value(
        self, x: Float[Array, "BT D"], cos_sin: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """[B, T, N, H] and, rotated as well, keys [B, K, T, H]; values [B, K, T, H]."""
        heads = (*cos_sin[0].shape[:2], -1, self.config.head_dim)

        def project(weight: Array, bias: Array) -> Float[Array, "B T heads H"]:
            return (x @ weight.astype(x.dtype) + bias.astype(x.dtype)).reshape(heads)

        query = rope(project(self.query, self.query_bias), *cos_sin)
        key = rope(project(self.key, self.key_bias), *cos_sin).transpose(0, 2, 1, 3)
        value = project(self.value, self.value_bias).transpose(0, 2, 1, 3)
        return (
            checkpoint_name(query, "query"),
            checkpoint_name(key, "key"),
            checkpoint_name(value, "value"),
        )


def init_params(model_config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters, shaped by the family's table, layers stacked on axis 0."""
    flat = {}
    for number, row in enumerate(families.parameters(model_config)):
        shape = families.stacked_shape(row, model_config)
        initializer = _initializer(row, model_config)
        flat[row.path] = initializer(jax.random.fold_in(key, number), shape, jnp.float32)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def num_params(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def init_cache(
    model_config: ModelConfig, batch_size: int, capacity: int, dtype: str = "float32"
) -> KVCache:
    """An empty cache of `capacity` slots for each of `batch_size` rows."""
    shape = (batch_size, model_config.num_kv_heads, capacity, model_config.head_dim)
    layers = range(model_config.num_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        segment_ids=jnp.zeros((batch_size, capacity), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def forward(
    params: Params,
    model_config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    cache: KVCache | None = None,
    runtime: Runtime = Runtime(),
) -> ForwardOutput:
    """Hidden states after the final norm.

    Without a cache a token attends to the earlier tokens of its segment in its row. With one, the
    tokens are written to slots [length, length + T) and attend to all slots of their segment up to
    their own.

    Args:
        params: As made by `init_params`.
        model_config: Architecture.
        tokens: Ids below vocab_size.
        positions: Rotary position of each token, from 0 in each sequence.
        segment_ids: 0 for padding; equal ids within a row see each other.
        cache: Of earlier tokens; needs room for T more.
        runtime: Precision and rematerialisation.
    """
    x = _embedded(params["embedding"][tokens.reshape(-1)].astype(runtime.dtype))
    cos_sin = rope_tables(positions, model_config.head_dim, model_config.rope_theta)
    if cache is None:
        x = _forward_scanned(params, model_config, x, cos_sin, segment_ids, runtime)
    else:
        x, cache = _forward_cached(params, model_config, x, cos_sin, segment_ids, cache)
    hidden = rms_norm(x, params["final_norm"], model_config.norm_epsilon)
    return ForwardOutput(hidden=hidden.reshape(*tokens.shape, -1), cache=cache, aux={})


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
    cos_sin: tuple[Array, Array],
    segment_ids: Array,
    runtime: Runtime,
) -> Array:
    block: Any = Block(config)

    def attend(query: Array, key: Array, value: Array) -> Array:
        return packed_attention(query, key, value, segment_ids)

    def layer(x: Array, weights: Params) -> tuple[Array, None]:
        return block.apply({"params": weights}, x, cos_sin, attend), None

    if runtime.remat != "none":
        names = _DOTS if runtime.remat == "dots" else ()
        # In a scan nothing else stops XLA from keeping what should be computed again.
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.lax.scan(layer, x, params["layers"])[0]


def _forward_cached(
    params: Params,
    config: ModelConfig,
    x: Array,
    cos_sin: tuple[Array, Array],
    segment_ids: Array,
    cache: KVCache,
) -> tuple[Array, KVCache]:
    num_new = segment_ids.shape[1]
    seen = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    slot_of_query = cache.length + jnp.arange(num_new)
    causal = jnp.arange(cache.capacity) <= slot_of_query[:, None]
    mask = causal & (segment_ids[:, :, None] == seen[:, None, :])
    keys, values = list(cache.keys), list(cache.values)
    block: Any = Block(config)

    def write(slots: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            slots, new.astype(slots.dtype), cache.length, axis=2
        )

    def attend(layer: int, query: Array, key: Array, value: Array) -> Array:
        keys[layer], values[layer] = write(keys[layer], key), write(values[layer], value)
        return attention(query, keys[layer], values[layer], mask)

    for layer in range(config.num_layers):
        weights = jax.tree.map(lambda stacked: stacked[layer], params["layers"])  # noqa: B023
        x = block.apply({"params": weights}, x, cos_sin, functools.partial(attend, layer))
    return x, KVCache(tuple(keys), tuple(values), seen, cache.length + num_new)


def output_head(params: Params, model_config: ModelConfig) -> Float[Array, "D V"]:
    """The output head: the embedding transposed where tied."""
    return params["embedding"].T if model_config.tie_embeddings else params["head"]
