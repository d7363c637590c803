"""One table per family: logical axes (hence shape and sharding), Hugging Face name, initialiser.

The Linen modules, sharding, import and export all read these rows; a new family is a new table.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srft_jax.config import AdaptedModelConfig, ModelConfig
from srft_jax.mesh import sharding


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row. Axes ("model", "mlp") mean shape [D, F], and [L, D, F] under `layers/`."""

    path: str  # in the nested dict, "/" between keys
    axes: tuple[str, ...]
    hf_name: str  # "{layer}" and "{expert}" stand for their numbers
    init: Literal["normal", "ones", "zeros", "fan_in"] = "normal"
    transpose: bool = False  # Hugging Face stores [out, in], we compute x @ [in, out]
    when: str | None = None  # the attribute of ModelConfig without which there is none
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
        return self.path.endswith("norm")


def _matrix(name: str, axes: tuple[str, ...], hf_name: str) -> Parameter:
    """Of a block, in Hugging Face's layout."""
    return Parameter(f"layers/{name}", axes, f"{_BLOCK}{hf_name}.weight", transpose=True)


def _bias(name: str, axis: str, hf_name: str, when: str | None = None) -> Parameter:
    return Parameter(f"layers/{name}_bias", (axis,), f"{_BLOCK}{hf_name}.bias", "zeros", when=when)


def _scale(
    name: str, hf_name: str, axis: str = "model", init: Literal["ones", "zeros"] = "ones"
) -> Parameter:
    return Parameter(f"layers/{name}", (axis,), f"{_BLOCK}{hf_name}.weight", init)


def _ends(norm_init: Literal["ones", "zeros"] = "ones") -> tuple[Parameter, ...]:
    return (
        Parameter("final_norm", ("model",), "model.norm.weight", norm_init),
        Parameter("head", ("model", "vocab"), "lm_head.weight", transpose=True, when="untied"),
    )


_BLOCK = "model.layers.{layer}."
_EMBEDDING = Parameter("embedding", ("vocab", "model"), "model.embed_tokens.weight")
_QUERY = _matrix("query", ("model", "heads"), "self_attn.q_proj")
_KEY = _matrix("key", ("model", "kv_heads"), "self_attn.k_proj")
_VALUE = _matrix("value", ("model", "kv_heads"), "self_attn.v_proj")
_OUTPUT = _matrix("output", ("heads", "model"), "self_attn.o_proj")
_PROJECTIONS = (_QUERY, _KEY, _VALUE, _OUTPUT)
_ATTENTION_BIAS = (
    _bias("query", "heads", "self_attn.q_proj", "attention_bias"),
    _bias("key", "kv_heads", "self_attn.k_proj", "attention_bias"),
    _bias("value", "kv_heads", "self_attn.v_proj", "attention_bias"),
    _bias("output", "model", "self_attn.o_proj", "attention_bias"),
)
_ATTENTION_NORM = _scale("attention_norm", "input_layernorm")
_MLP_NORM = _scale("mlp_norm", "post_attention_layernorm")
_NORMS_OF_HEADS = (
    _scale("query_norm", "self_attn.q_norm", "head"),
    _scale("key_norm", "self_attn.k_norm", "head"),
)
_MLP = (
    _matrix("gate", ("model", "mlp"), "mlp.gate_proj"),
    _matrix("up", ("model", "mlp"), "mlp.up_proj"),
    _matrix("down", ("mlp", "model"), "mlp.down_proj"),
)
_MLP_BIAS = (
    _bias("gate", "mlp", "mlp.gate_proj", "mlp_bias"),
    _bias("up", "mlp", "mlp.up_proj", "mlp_bias"),
    _bias("down", "model", "mlp.down_proj", "mlp_bias"),
)
_EXPERTS = (
    _matrix("router", ("model", "experts"), "mlp.gate"),
    _matrix("expert_gate", ("experts", "model", "mlp"), "mlp.experts.{expert}.gate_proj"),
    _matrix("expert_up", ("experts", "model", "mlp"), "mlp.experts.{expert}.up_proj"),
    _matrix("expert_down", ("experts", "mlp", "model"), "mlp.experts.{expert}.down_proj"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Its table, and what of its function no parameter and no key of config.json tells.

    Attributes:
        table: Rows of parameters.
        norm_offset: Norms multiply by this and their scale.
        scales_embedding: The residual stream starts at sqrt(D) times the embedding.
    """

    table: tuple[Parameter, ...]
    norm_offset: float = 0.0
    scales_embedding: bool = False


QWEN2 = (
    _EMBEDDING,
    _ATTENTION_NORM,
    _QUERY,
    _bias("query", "heads", "self_attn.q_proj"),
    _KEY,
    _bias("key", "kv_heads", "self_attn.k_proj"),
    _VALUE,
    _bias("value", "kv_heads", "self_attn.v_proj"),
    _OUTPUT,
    _MLP_NORM,
    *_MLP,
    *_ends(),
)

QWEN3 = (
    *(_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, *_ATTENTION_BIAS, *_NORMS_OF_HEADS),
    *(_MLP_NORM, *_MLP, *_ends()),
)

LLAMA = (
    *(_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, *_ATTENTION_BIAS),
    *(_MLP_NORM, *_MLP, *_MLP_BIAS, *_ends()),
)

MISTRAL = (_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, _MLP_NORM, *_MLP, *_ends())

GEMMA3 = (
    _EMBEDDING,
    _scale("attention_norm", "input_layernorm", init="zeros"),
    *(*_PROJECTIONS, *_ATTENTION_BIAS),
    _scale("query_norm", "self_attn.q_norm", "head", "zeros"),
    _scale("key_norm", "self_attn.k_norm", "head", "zeros"),
    _scale("attention_out_norm", "post_attention_layernorm", init="zeros"),
    _scale("mlp_norm", "pre_feedforward_layernorm", init="zeros"),
    *_MLP,
    _scale("mlp_out_norm", "post_feedforward_layernorm", init="zeros"),
    *_ends("zeros"),
)

QWEN3_MOE = (
    *(_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, *_ATTENTION_BIAS, *_NORMS_OF_HEADS),
    *(_MLP_NORM, *_EXPERTS, *_ends()),
)

FAMILIES = {
    "qwen2": Family(QWEN2),
    "qwen3": Family(QWEN3),
    "llama": Family(LLAMA),
    "mistral": Family(MISTRAL),
    "gemma3": Family(GEMMA3, norm_offset=1.0, scales_embedding=True),
    "qwen3_moe": Family(QWEN3_MOE),
}


def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Rows of the table that this model has, those of adapters last."""
    table = FAMILIES[config.family].table
    rows = tuple(row for row in table if row.when is None or getattr(config, row.when))
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
        "head": config.head_dim,
        "mlp": config.mlp_dim,
        "experts": config.num_experts or 0,
    }
    if isinstance(config, AdaptedModelConfig):
        sizes["rank"] = config.lora.rank
    return tuple(sizes[axis] for axis in parameter.axes)


def stacked_shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Shape in the nested dict: with the leading [L] where there is one per layer."""
    return (config.num_layers,) * parameter.stacked + shape(parameter, config)


def hf_names(parameter: Parameter, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name of each tensor that the parameter is stored as -> its place in it.

    In: "...{layer}.experts.{expert}.up_proj.weight".  Out: {"...0.experts.0.up...": (0, 0), ...}.
    """
    axes = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in parameter.hf_name]
    places = np.ndindex(stacked_shape(parameter, config)[: len(axes)])
    return {
        parameter.hf_name.format(**dict(zip(axes, place, strict=True))): place for place in places
    }


def hf_shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Of each of these tensors."""
    sizes = shape(parameter, config)["{expert}" in parameter.hf_name :]
    return sizes[::-1] if parameter.transpose else sizes


def hf_axes(parameter: Parameter) -> tuple[str, ...]:
    """Logical axes of each of these tensors."""
    axes = parameter.axes["{expert}" in parameter.hf_name :]
    return axes[::-1] if parameter.transpose else axes


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
        if names[0] not in layer:  # experts have no gate of the layer's own
            continue
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


def counting_heads(config: ModelConfig) -> ModelConfig:
    """In shapes of this one a head counts as 1. It is what mesh axes have to divide: half a head
    on a device would have to be exchanged with the other half at every use."""
    return dataclasses.replace(config, head_dim=1)


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """Of each parameter, by its logical axes; layers are never split, nor are heads in two."""
    counted = counting_heads(config)
    return by_path(
        {
            row.path: sharding(mesh, row.stacked_axes, stacked_shape(row, counted))
            for row in parameters(config)
        }
    )
