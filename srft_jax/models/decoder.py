"""The decoder: a Flax Linen block, used purely, behind `init_params`, `forward`, `output_head`.

Parameters are a nested dict with layers stacked on axis 0. Training scans the block over the
layers, so compile time does not grow with depth. With a KV cache the layers are unrolled, so that
each layer's cache is a buffer of its own that XLA updates in place; a scan would copy the whole
cache once a token.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from srft_jax.batch import KVCache
from srft_jax.config import ModelConfig
from srft_jax.models import families
from srft_jax.ops.attention import attention, packed_mask
from srft_jax.ops.layers import rms_norm, rope

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a forward pass is computed; the result is the same up to rounding.

    Attributes:
        dtype: Of activations and matmul inputs.
        remat: Recompute each block in the backward pass.
    """

    dtype: str = "float32"
    remat: bool = False


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

    def keys_values(
        self, x: Float[Array, "BT D"], positions: Int[Array, "B T"]
    ) -> tuple[Array, Array]:
        """Rotated keys and values of new tokens, each [B, K, T, H]."""
        batch, length = positions.shape
        heads = (batch, length, self.config.num_kv_heads, self.config.head_dim)
        key = (x @ self.key.astype(x.dtype) + self.key_bias.astype(x.dtype)).reshape(heads)
        value = (x @ self.value.astype(x.dtype) + self.value_bias.astype(x.dtype)).reshape(heads)
        key = rope(key, positions, self.config.rope_theta)
        return key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)

    def __call__(
        self,
        x: Float[Array, "BT D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cached: tuple[Array, Array, Int[Array, ""]] | None,
    ) -> tuple[Float[Array, "BT D"], tuple[Array, Array]]:
        """Returns x after the block, and the keys and values that were attended to.

        Args:
            x: Residual stream.
            positions: Of the new tokens.
            mask: Which keys a query sees.
            cached: Keys, values [B, K, S, H] and the slot of the first new token; None without.
        """
        config, dtype = self.config, x.dtype
        with jax.named_scope("attention"):
            normed = rms_norm(x, self.attention_norm, config.norm_epsilon)
            key, value = self.keys_values(normed, positions)
            if cached is not None:
                cached_key, cached_value, length = cached
                key = jax.lax.dynamic_update_slice_in_dim(
                    cached_key, key.astype(cached_key.dtype), length, axis=2
                )
                value = jax.lax.dynamic_update_slice_in_dim(
                    cached_value, value.astype(cached_value.dtype), length, axis=2
                )
            query = normed @ self.query.astype(dtype) + self.query_bias.astype(dtype)
            query = rope(
                query.reshape(*positions.shape, config.num_heads, -1), positions, config.rope_theta
            )
            mixed = attention(query, key, value, mask).reshape(x.shape[0], -1)
            x = x + mixed @ self.output.astype(dtype)
        with jax.named_scope("mlp"):
            normed = rms_norm(x, self.mlp_norm, config.norm_epsilon)
            hidden = nn.silu(normed @ self.gate.astype(dtype)) * (normed @ self.up.astype(dtype))
            return x + hidden @ self.down.astype(dtype), (key, value)


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
    x = params["embedding"].astype(runtime.dtype)[tokens.reshape(-1)]
    if cache is None:
        x = _forward_scanned(params, model_config, x, positions, packed_mask(segment_ids), runtime)
    else:
        x, cache = _forward_cached(params, model_config, x, positions, segment_ids, cache)
    hidden = rms_norm(x, params["final_norm"], model_config.norm_epsilon)
    return ForwardOutput(hidden=hidden.reshape(*tokens.shape, -1), cache=cache, aux={})


def _forward_scanned(
    params: Params, config: ModelConfig, x: Array, positions: Array, mask: Array, runtime: Runtime
) -> Array:
    block = Block(config)

    def layer(x: Array, weights: Params) -> tuple[Array, None]:
        return block.apply({"params": weights}, x, positions, mask, None)[0], None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if runtime.remat else layer, x, params["layers"])
    return x


def _forward_cached(
    params: Params,
    config: ModelConfig,
    x: Array,
    positions: Array,
    segment_ids: Array,
    cache: KVCache,
) -> tuple[Array, KVCache]:
    num_new = segment_ids.shape[1]
    seen = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    slot_of_query = cache.length + jnp.arange(num_new)
    causal = jnp.arange(cache.capacity) <= slot_of_query[:, None]
    mask = causal & (segment_ids[:, :, None] == seen[:, None, :])
    keys: list[Array] = []
    values: list[Array] = []
    for number in range(config.num_layers):
        weights = jax.tree.map(lambda stacked: stacked[number], params["layers"])  # noqa: B023
        cached = (cache.keys[number], cache.values[number], cache.length)
        out: Any = Block(config).apply({"params": weights}, x, positions, mask, cached)
        x, (key, value) = out
        keys.append(key)
        values.append(value)
    return x, KVCache(tuple(keys), tuple(values), seen, cache.length + num_new)


def output_head(params: Params, model_config: ModelConfig) -> Float[Array, "D V"]:
    """The output head: the embedding transposed where tied."""
    return params["embedding"].T if model_config.tie_embeddings else params["head"]
