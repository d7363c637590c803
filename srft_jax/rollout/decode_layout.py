"""The policy's parameters as decode steps read them: dtype, layout, one buffer a layer.

A prefill reads the trainer's layers as they are, as the trainer's forward pass does.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from srft_jax.config import ModelConfig
from srft_jax.mesh import constrained, sharding
from srft_jax.models import families
from srft_jax.models.decoder import Params


def decode_params(params: Params, config: ModelConfig, dtype: str, mesh: Mesh | None) -> Params:
    """Return matrices and biases rounded to `dtype`, as the trainer does at each use, on `mesh`.

    This happens on the devices: bfloat16 is made from float32 shard by shard, and no second float32
    copy exists. It happens a layer at a time: in one program XLA holds all of the result twice.
    Layers come as a tuple, each array a buffer of its own: out of a stack a loop of decode steps
    would copy them at every step. Scales of norms, which the trainer does not round, are not
    rounded. Matrices that multiply the same vector are joined where their columns are not split.
    """
    convert_layer, convert_rest = conversions(config, dtype, mesh)
    layers = tuple(convert_layer(params["layers"], np.int32(n)) for n in range(config.num_layers))
    return convert_rest({k: v for k, v in params.items() if k != "layers"}) | {"layers": layers}


@functools.cache
def conversions(config: ModelConfig, dtype: str, mesh: Mesh | None) -> tuple[Any, Any]:
    """Return two programs: (stacked layers, number) -> one layer; other parameters -> the same."""
    table, counted = _table(config), families.counting_heads(config)

    def convert(leaf: jax.Array, parameter: families.Parameter) -> jax.Array:
        # Rounded where the trainer has it, so that devices do not exchange float32.
        rounded = leaf if parameter.is_scale else leaf.astype(dtype)
        return constrained(rounded, parameter.axes, families.shape(parameter, counted))

    def convert_layer(layers: Params, number: jax.Array) -> Params:
        layer = jax.tree.map(lambda stacked: stacked[number], layers)
        layer = jax.tree.map(convert, layer, table["layers"])
        return layer if _splits_columns(mesh) else families.join_matrices(layer)

    def convert_rest(rest: Params) -> Params:
        return jax.tree.map(convert, rest, {name: table[name] for name in rest})

    if mesh is None:
        return jax.jit(convert_layer), jax.jit(convert_rest)
    where = decode_shardings(mesh, config)
    layer = where.pop("layers")[0]
    return jax.jit(convert_layer, out_shardings=layer), jax.jit(convert_rest, out_shardings=where)


def decode_shardings(mesh: Mesh, config: ModelConfig) -> Params:
    """Return the sharding of each parameter of `decode_params`.

    Heads that do not divide are replicated, as the cache is.
    """
    counted = families.counting_heads(config)

    def place(parameter: families.Parameter) -> NamedSharding:
        return sharding(mesh, parameter.axes, families.shape(parameter, counted))

    where = jax.tree.map(place, _table(config))
    if not _splits_columns(mesh):
        where["layers"] = dict.fromkeys(families.block_shapes(config, True), sharding(mesh, (), ()))
    return where | {"layers": (where["layers"],) * config.num_layers}


def _splits_columns(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.shape["tensor"] > 1


def _table(config: ModelConfig) -> Any:
    """The family's table in the structure of the parameters."""
    return families.by_path({entry.path: entry for entry in families.parameters(config)})
