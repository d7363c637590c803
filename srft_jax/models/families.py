"""One table per family, an entry per parameter: logical axes, Hugging Face name, initialiser.

The axes give shape and sharding. The Linen modules, import and export all read these tables; a new
family is a new table. What a family's config.json calls its sizes stands in hf_config_keys.py.
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
    """An entry of the table: the same parameter of all layers, or one outside of them."""

    path: str  # in the nested dict of parameters, "/" between keys
    axes: tuple[str, ...]  # ("model", "mlp") is shape [D, F], and [L, D, F] under `layers/`
    hf_name: str  # where "{layer}" and "{expert}" stand for their numbers
    init: Literal["normal", "ones", "zeros", "fan_in"] = "normal"
    transpose: bool = False  # Hugging Face stores [out, in]; we compute x @ [in, out]
    when: str | None = None  # attribute of ModelConfig that must be true for a model to have it
    is_adapter: bool = False  # a low-rank factor beside a matrix, see `_adapter`

    @property
    def stacked(self) -> bool:
        """Whether each layer has one, stacked on axis 0."""
        return self.path.startswith("layers/")

    @property
    def stacked_axes(self) -> tuple[str, ...]:
        return ("layers", *self.axes) if self.stacked else self.axes

    @property
    def name(self) -> str:
        """Name within the block; for a parameter outside of it, its path."""
        return self.path.removeprefix("layers/")

    @property
    def is_scale(self) -> bool:
        """Whether it is a norm's scale, which multiplies in float32 whatever the activations."""
        return self.path.endswith("norm")


_HF_LAYER = "model.layers.{layer}."  # how Hugging Face's names of a block's parameters begin


def _matrix(name: str, axes: tuple[str, ...], hf_name: str) -> Parameter:
    """A block's matrix; Hugging Face stores it transposed."""
    return Parameter(f"layers/{name}", axes, f"{_HF_LAYER}{hf_name}.weight", transpose=True)


def _bias(name: str, axis: str, hf_name: str, when: str | None = None) -> Parameter:
    return Parameter(
        f"layers/{name}_bias", (axis,), f"{_HF_LAYER}{hf_name}.bias", "zeros", when=when
    )


def _scale(
    name: str, hf_name: str, axis: str = "model", init: Literal["ones", "zeros"] = "ones"
) -> Parameter:
    return Parameter(f"layers/{name}", (axis,), f"{_HF_LAYER}{hf_name}.weight", init)


def _after_blocks(norm_init: Literal["ones", "zeros"] = "ones") -> tuple[Parameter, ...]:
    return (
        Parameter("final_norm", ("model",), "model.norm.weight", norm_init),
        Parameter("head", ("model", "vocab"), "lm_head.weight", transpose=True, when="untied"),
    )


# Parameters that several families share, in Hugging Face's names.
_EMBEDDING = Parameter("embedding", ("vocab", "model"), "model.embed_tokens.weight")
_QUERY = _matrix("query", ("model", "heads"), "self_attn.q_proj")
_KEY = _matrix("key", ("model", "kv_heads"), "self_attn.k_proj")
_VALUE = _matrix("value", ("model", "kv_heads"), "self_attn.v_proj")
_OUTPUT = _matrix("output", ("heads", "model"), "self_attn.o_proj")
_PROJECTIONS = (_QUERY, _KEY, _VALUE, _OUTPUT)
# Biases that a config.json may ask for; qwen2 has three of them always.
_ATTENTION_BIAS = (
    _bias("query", "heads", "self_attn.q_proj", "attention_bias"),
    _bias("key", "kv_heads", "self_attn.k_proj", "attention_bias"),
    _bias("value", "kv_heads", "self_attn.v_proj", "attention_bias"),
    _bias("output", "model", "self_attn.o_proj", "attention_bias"),
)
_ATTENTION_NORM = _scale("attention_norm", "input_layernorm")
_MLP_NORM = _scale("mlp_norm", "post_attention_layernorm")
_HEAD_NORMS = (
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
# One matrix of ours [E, in, out] is E tensors of Hugging Face's.
_EXPERTS = (
    _matrix("router", ("model", "experts"), "mlp.gate"),
    _matrix("expert_gate", ("experts", "model", "mlp"), "mlp.experts.{expert}.gate_proj"),
    _matrix("expert_up", ("experts", "model", "mlp"), "mlp.experts.{expert}.up_proj"),
    _matrix("expert_down", ("experts", "mlp", "model"), "mlp.experts.{expert}.down_proj"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its table, and what neither its parameters nor its config.json say.

    Attributes:
        table: Parameters, in the order in which they are initialised and exported.
        norm_offset: Number added to the scale that a norm multiplies by.
        scales_embedding: Whether the residual stream starts at sqrt(D) times the embedding.
    """

    table: tuple[Parameter, ...]
    norm_offset: float = 0.0
    scales_embedding: bool = False


# The order of a table is the order in which parameters are initialised (a parameter's number is
# folded into the key) and exported: a change of it changes every random start.
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
    *_after_blocks(),
)

QWEN3 = (
    *(_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, *_ATTENTION_BIAS, *_HEAD_NORMS),
    *(_MLP_NORM, *_MLP, *_after_blocks()),
)

LLAMA = (
    *(_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, *_ATTENTION_BIAS),
    *(_MLP_NORM, *_MLP, *_MLP_BIAS, *_after_blocks()),
)

MISTRAL = (_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, _MLP_NORM, *_MLP, *_after_blocks())

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
    *_after_blocks("zeros"),
)

QWEN3_MOE = (
    *(_EMBEDDING, _ATTENTION_NORM, *_PROJECTIONS, *_ATTENTION_BIAS, *_HEAD_NORMS),
    *(_MLP_NORM, *_EXPERTS, *_after_blocks()),
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
    """Return the parameters of the family's table that this model has, those of adapters last."""
    table = FAMILIES[config.family].table
    present = tuple(entry for entry in table if entry.when is None or getattr(config, entry.when))
    if not isinstance(config, AdaptedModelConfig):
        return present
    adapted = [entry for entry in present if entry.stacked and entry.name in config.lora.targets]
    return present + tuple(factor for matrix in adapted for factor in _adapter(matrix))


def adapter_names(name: str) -> tuple[str, str]:
    """Return the names of the two low-rank factors beside a matrix."""
    return f"{name}_lora_a", f"{name}_lora_b"


def _adapter(matrix: Parameter) -> tuple[Parameter, Parameter]:
    """The two factors beside a matrix [in, out]: A [in, r] and B [r, out].

    They have PEFT's names and initial values, so their product starts at 0.
    """
    inputs, outputs = matrix.axes
    a, b = adapter_names(matrix.path)
    module = "base_model.model." + matrix.hf_name.removesuffix("weight")
    factor = dataclasses.replace(matrix, is_adapter=True)
    return (
        dataclasses.replace(
            factor, path=a, axes=(inputs, "rank"), hf_name=module + "lora_A.weight", init="fan_in"
        ),
        dataclasses.replace(
            factor, path=b, axes=("rank", outputs), hf_name=module + "lora_B.weight", init="zeros"
        ),
    )


def shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of one layer's parameter, without the leading [L]."""
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
    """Return the shape in the nested dict: with the leading [L] where each layer has one."""
    return (config.num_layers,) * parameter.stacked + shape(parameter, config)


def hf_names(parameter: Parameter, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name of each Hugging Face tensor of a parameter -> its place on the leading axes.

    In: "...{layer}.experts.{expert}.up_proj.weight".  Out: {"...0.experts.0.up...": (0, 0), ...}.
    """
    numbered = [axis for axis in ("layer", "expert") if f"{{{axis}}}" in parameter.hf_name]
    places = np.ndindex(stacked_shape(parameter, config)[: len(numbered)])
    return {
        parameter.hf_name.format(**dict(zip(numbered, place, strict=True))): place
        for place in places
    }


def hf_shape(parameter: Parameter, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of each of these tensors."""
    # Each expert's matrix is a tensor by itself: without the leading [E].
    sizes = shape(parameter, config)["{expert}" in parameter.hf_name :]
    return sizes[::-1] if parameter.transpose else sizes


def hf_axes(parameter: Parameter) -> tuple[str, ...]:
    """Return the logical axes of each of these tensors."""
    axes = parameter.axes["{expert}" in parameter.hf_name :]
    return axes[::-1] if parameter.transpose else axes


# Matrices of a block that multiply the same vector, and can be joined for decoding.
_JOINED = (("query", "key", "value"), ("gate", "up"))


def joined_name(names: Sequence[str]) -> str:
    """Return the name of these matrices joined.  In: ("gate", "up").  Out: "gate_up"."""
    return "_".join(names)


def join_matrices(layer: dict[str, Any]) -> dict[str, Any]:
    """Join matrices of one layer that multiply the same vector, side by side.

    A decode step has few rows, and then one product is quicker than three. Columns that are split
    over devices must not be joined.

    In: query [D, 4], key [D, 2], value [D, 2], ...  Out: query_key_value [D, 8], ...
    """
    layer = dict(layer)
    for names in _JOINED:
        if names[0] not in layer:  # a layer with experts has no "gate"
            continue
        parts = [layer.pop(name) for name in names]
        layer[joined_name(names)] = jnp.concatenate(parts, axis=1)
    return layer


def is_joined(layer: dict[str, Any]) -> bool:
    """Tell whether `join_matrices` has made this layer's parameters."""
    return joined_name(_JOINED[0]) in layer


def block_shapes(config: ModelConfig, as_joined: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of one block, by name."""
    shapes = {entry.name: shape(entry, config) for entry in parameters(config) if entry.stacked}
    if not as_joined:
        return shapes
    layer = {name: jax.ShapeDtypeStruct(size, "float32") for name, size in shapes.items()}
    return {name: leaf.shape for name, leaf in jax.eval_shape(join_matrices, layer).items()}


def by_path(values: dict[str, Any]) -> dict[str, Any]:
    """Nest a dict by its paths.

    In: {"layers/query": x, "head": y}.  Out: {"layers": {"query": x}, "head": y}.
    """
    return flax.traverse_util.unflatten_dict(values, sep="/")


def counting_heads(config: ModelConfig) -> ModelConfig:
    """Return a config with head_dim = 1, in whose shapes divisibility tests count whole heads.

    Half a head on a device would have to be exchanged with the other half at every use.
    """
    return dataclasses.replace(config, head_dim=1)


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """Return each parameter's sharding by its logical axes; layers and heads stay whole."""
    whole_heads = counting_heads(config)
    return by_path(
        {
            entry.path: sharding(mesh, entry.stacked_axes, stacked_shape(entry, whole_heads))
            for entry in parameters(config)
        }
    )
