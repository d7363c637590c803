"""One table per family: logical axes (hence shape and sharding), Hugging Face name, initialiser.

The Linen modules, sharding, import and export all read these rows; a new family is a new table.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srft_jax.config import AdaptedModelConfig, ModelConfig
from srft_jax.mesh import sharding


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row. Axes ("model", "mlp") mean shape [D, F], and [L, D, F] under `layers/`."""

    path: str  # in the nested dict, "/" between keys
    axes: tuple[str, ...]
    hf_name: str  # "{layer}" stands for the layer's number
    init: Literal["normal", "ones", "zeros", "fan_in"] = "normal"
    transpose: bool = False  # Hugging Face stores [out, in], we compute x @ [in, out]
    untied_only: bool = False  # absent where the head is the embedding
    is_adapter: bool = False  # a low-rank factor beside a matrix, see `_adapter`

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        return ("layers", *self.axes) if self.stacked else self.axes

    @property
    def name(self) -> str:
        """Within the block, or of the parameter outside of it."""
        return self.path.removeprefix("layers/")

    @property
    def is_scale(self) -> bool:
        """Of a norm, which multiplies in float32 whatever the activations."""
        return self.init == "ones"


_BLOCK = "model.layers.{layer}."

QWEN2 = (
    Parameter("embedding", ("vocab", "model"), "model.embed_tokens.weight"),
    Parameter("layers/attention_norm", ("model",), _BLOCK + "input_layernorm.weight", "ones"),
    Parameter(
        "layers/query", ("model", "heads"), _BLOCK + "self_attn.q_proj.weight", transpose=True
    ),
    Parameter("layers/query_bias", ("heads",), _BLOCK + "self_attn.q_proj.bias", "zeros"),
    Parameter(
        "layers/key", ("model", "kv_heads"), _BLOCK + "self_attn.k_proj.weight", transpose=True
    ),
    Parameter("layers/key_bias", ("kv_heads",), _BLOCK + "self_attn.k_proj.bias", "zeros"),
    Parameter(
        "layers/value", ("model", "kv_heads"), _BLOCK + "self_attn.v_proj.weight", transpose=True
    ),
    Parameter("layers/value_bias", ("kv_heads",), _BLOCK + "self_attn.v_proj.bias", "zeros"),
    Parameter(
        "layers/output", ("heads", "model"), _BLOCK + "self_attn.o_proj.weight", transpose=True
    ),
    Parameter("layers/mlp_norm", ("model",), _BLOCK + "post_attention_layernorm.weight", "ones"),
    Parameter("layers/gate", ("model", "mlp"), _BLOCK + "mlp.gate_proj.weight", transpose=True),
    Parameter("layers/up", ("model", "mlp"), _BLOCK + "mlp.up_proj.weight", transpose=True),
    Parameter("layers/down", ("mlp", "model"), _BLOCK + "mlp.down_proj.weight", transpose=True),
    Parameter("final_norm", ("model",), "model.norm.weight", "ones"),
    Parameter("head", ("model", "vocab"), "lm_head.weight", transpose=True, untied_only=True),
)

FAMILIES: dict[str, tuple[Parameter, ...]] = {"qwen2": QWEN2}


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Rows of the table that this model has, those of adapters last."""
    rows = tuple(
        p for p in FAMILIES[config.family] if not (p.untied_only and config.tie_embeddings)
    )
    if not isinstance(config, AdaptedModelConfig):
        return rows
    adapted = [row for row in rows if row.stacked and row.name in config.lora.targets]
    return rows + tuple(factor for row in adapted for factor in _adapter(row))


def adapter_names(name: str) -> tuple[str, str]:
    """Of the two low-rank factors beside a matrix."""
    return f"{name}_lora_a", f"{name}_lora_b"


def _adapter(row: Parameter) -> tuple[Parameter, Parameter]:
    """Beside a matrix [in, out]: A [in, r] and B [r, out], in PEFT's names and initialised as PEFT
    does, so that their product starts at 0."""
    inputs, outputs = row.axes
    a, b = adapter_names(row.path)
    module = "base_model.model." + row.hf_name.removesuffix("weight")
    whole = dataclasses.replace(row, is_adapter=True)
    return (
        dataclasses.replace(
            whole, path=a, axes=(inputs, "rank"), hf_name=module + "lora_A.weight", init="fan_in"
        ),
        dataclasses.replace(
            whole, path=b, axes=("rank", outputs), hf_name=module + "lora_B.weight", init="zeros"
        ),
    )


def shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one layer's parameter, without the leading [L]."""
    sizes = {
        "vocab": config.vocab_size,
        "model": config.dim,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.mlp_dim,
    }
    if isinstance(config, AdaptedModelConfig):
        sizes["rank"] = config.lora.rank
    return tuple(sizes[axis] for axis in parameter.axes)


def stacked_shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Shape in the nested dict: with the leading [L] where there is one per layer."""
    return (config.num_layers,) * parameter.stacked + shape(parameter, config)


# Matrices of a block that multiply the same vector.
_JOINED = (("query", "key", "value"), ("gate", "up"))


def joined_name(names: Sequence[str]) -> str:
    return "_".join(names)


def joined(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's parameters with such matrices side by side in one: few rows then take one product
    where they took three. Not for columns that are split over devices.

    In: query [D, 4], key [D, 2], value [D, 2], ...  Out: query_key_value [D, 8], ...
    """
    layer = dict(layer)
    for names in _JOINED:
        parts = [layer.pop(name) for name in names]
        layer[joined_name(names)] = jnp.concatenate(parts, axis=1)
    return layer


def is_joined(layer: dict[str, Any]) -> bool:
    return joined_name(_JOINED[0]) in layer


def block_shapes(config: ModelConfig, as_joined: bool) -> dict[str, tuple[int, ...]]:
    """Of each parameter of one block."""
    rows = [row for row in parameters(config) if row.stacked]
    layer = {row.name: jax.ShapeDtypeStruct(shape(row, config), "float32") for row in rows}
    layer = jax.eval_shape(joined, layer) if as_joined else layer
    return {name: one.shape for name, one in layer.items()}


def by_path(values: dict[str, Any]) -> dict[str, Any]:
    """In: {"layers/query": x, "head": y}.  Out: {"layers": {"query": x}, "head": y}."""
    return flax.traverse_util.unflatten_dict(values, sep="/")


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """Of each parameter, by its logical axes; layers are never split."""
    return by_path(
        {
            row.path: sharding(mesh, row.stacked_axes, stacked_shape(row, config))
            for row in parameters(config)
        }
    )
