"""One transformer block of every family: a Flax Linen module whose parameters are the table's.

The caller decides which tokens are attended to, and whether keys come from a cache.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from srft_jax.config import AdaptedModelConfig, ModelConfig
from srft_jax.models import families
from srft_jax.ops.experts import ExpertOptions, ExpertParams, expert_mlp
from srft_jax.ops.layers import rms_norm
from srft_jax.ops.rope import rope

# From new tokens' query [B, T, N, H], key and value [B, K, T, H] to mixed values [B, T, N, H].
Attend = Callable[[Array, Array, Array], Array]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on flat tokens [B*T, D].

    Tokens are flat because XLA contracts the two dimensions of [B, T, D] slowly in weight gradients
    (1.9x on CPU). A family's additions are computed wherever the table has their parameters:
    biases, norms of queries and keys, norms of the outputs of attention and MLP, experts.
    """

    config: ModelConfig
    joined: bool = False  # whether matrices are joined as by `families.join_matrices`

    def setup(self) -> None:
        for name, shape in families.block_shapes(self.config, self.joined).items():
            # Linen wants an initialiser; it is never called, as `init_params` makes all values.
            setattr(self, name, self.param(name, nn.initializers.zeros, shape))

    def __call__(
        self, x: Float[Array, "BT D"], cos_sin: tuple[Array, Array], attend: Attend
    ) -> Float[Array, "BT D"]:
        """Compute the residual stream after the block.

        Args:
            x: Residual stream before it.
            cos_sin: Rotary tables of the new tokens, [B, T, H / 2] each.
            attend: Attention; called once.
        """
        with jax.named_scope("attention"):
            mixed = attend(*self._query_key_value(self._normed(x, "attention_norm"), cos_sin))
            (out,) = self._products(mixed.reshape(x.shape[0], -1), "output")
            x = x + self._normed_if_there(out, "attention_out_norm")
            x = checkpoint_name(x, "middle")
        with jax.named_scope("mlp"):
            out = self._mlp(self._normed(x, "mlp_norm"))
            return x + self._normed_if_there(out, "mlp_out_norm")

    def _has(self, name: str) -> bool:
        return name in families.block_shapes(self.config, self.joined)

    def _normed(self, x: Array, name: str) -> Array:
        return normed(x, getattr(self, name), self.config)

    def _normed_if_there(self, x: Array, name: str) -> Array:
        return self._normed(x, name) if self._has(name) else x

    def _mlp(self, x: Float[Array, "BT D"]) -> Float[Array, "BT D"]:
        config, activation = self.config, _ACTIVATIONS[self.config.activation]
        if self._has("router"):
            assert config.experts_per_token is not None  # checked with the architecture
            options = ExpertOptions(config.experts_per_token, config.norm_topk_prob, activation)
            experts = ExpertParams(self.router, self.expert_gate, self.expert_up, self.expert_down)
            return expert_mlp(x, experts, options)
        gate, up = self._products(x, "gate", "up")
        # Names by which `remat` keeps arrays, here and below; see decoder.DOTS.
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        (out,) = self._products(activation(gate) * up, "down")
        return out

    def _products(self, x: Float[Array, "BT in"], *names: str) -> list[Array]:
        """x times each of the named matrices, with their biases and adapters if there are any."""
        products = zip(names, self._plain_products(x, *names), strict=True)
        return [
            self._with_adapter(name, x, self._biased(name, product)) for name, product in products
        ]

    def _plain_products(self, x: Float[Array, "BT in"], *names: str) -> list[Array]:
        """x times each matrix alone; one product, then split, where the matrices are joined."""
        joined = families.joined_name(names)
        if len(names) == 1 or not self._has(joined):
            return [x @ getattr(self, name).astype(x.dtype) for name in names]
        shapes = families.block_shapes(self.config, as_joined=False)
        # In: widths 4, 2, 2.  Out: split before columns 4 and 6.
        ends = np.cumsum([shapes[name][1] for name in names])
        return jnp.split(x @ getattr(self, joined).astype(x.dtype), ends[:-1], axis=1)

    def _biased(self, name: str, product: Array) -> Array:
        bias = f"{name}_bias"
        return product + getattr(self, bias).astype(product.dtype) if self._has(bias) else product

    def _with_adapter(
        self, name: str, x: Float[Array, "BT in"], product: Float[Array, "BT out"]
    ) -> Float[Array, "BT out"]:
        """x W + scale (x A) B, given x W; W + scale A B is never formed, nor a gradient like it."""
        if not isinstance(self.config, AdaptedModelConfig) or name not in self.config.lora.targets:
            return product
        a, b = (getattr(self, factor).astype(x.dtype) for factor in families.adapter_names(name))
        return product + self.config.lora.scale * ((x @ a) @ b)

    def _query_key_value(
        self, x: Float[Array, "BT D"], cos_sin: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Queries [B, T, N, H] and keys [B, K, T, H], both rotated, and values [B, K, T, H]."""
        # Flat tokens [B*T, D] become rows again, as the tables [B, T, H / 2] have them.
        heads = (*cos_sin[0].shape[:2], -1, self.config.head_dim)
        products = self._products(x, "query", "key", "value")
        query, key, value = (product.reshape(heads) for product in products)
        query = rope(self._normed_if_there(query, "query_norm"), *cos_sin)
        key = rope(self._normed_if_there(key, "key_norm"), *cos_sin).transpose(0, 2, 1, 3)
        return (
            checkpoint_name(query, "query"),
            checkpoint_name(key, "key"),
            checkpoint_name(value.transpose(0, 2, 1, 3), "value"),
        )


def normed(x: Float[Array, "*lead D"], scale: Float[Array, " D"], config: ModelConfig) -> Array:
    """Normalise x by RMSNorm, with the family's offset of the scale."""
    return rms_norm(x, scale, config.norm_epsilon, families.FAMILIES[config.family].norm_offset)
