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
    """Matrices and biases rounded to `dtype`, as the trainer does at each use, laid out on `mesh`.

    On the devices: bfloat16 is made from float32 shard by shard, and no second float32 copy exists.
    A layer at a time: in one program XLA holds all of the result twice. Layers come as a tuple,
    each array a buffer of its own: out of a stack a loop of decode steps would copy them at every
    step. Scales of norms, which the trainer does not round, are not rounded. Matrices that multiply
    the same vector are joined where their columns are not split.
    """
    of_layer, of_rest = conversions(config, dtype, mesh)
    layers = tuple(of_layer(params["layers"], np.int32(n)) for n in range(config.num_layers))
    return of_rest({k: v for k, v in params.items() if k != "layers"}) | {"layers": layers}


@functools.cache
def conversions(config: ModelConfig, dtype: str, mesh: Mesh | None) -> tuple[Any, Any]:
    """Programs: (stacked layers, number) -> that layer; all other parameters -> the same."""
    rows, counted = _rows(config), families.counting_heads(config)

    def convert(leaf: jax.Array, row: families.Parameter) -> jax.Array:
        # Rounded where the trainer has it, so that devices do not exchange float32.
        rounded = leaf if row.is_scale else leaf.astype(dtype)
        return constrained(rounded, row.axes, families.shape(row, counted))

    def of_layer(layers: Params, number: jax.Array) -> Params:
        layer = jax.tree.map(lambda stacked: stacked[number], layers)
        layer = jax.tree.map(convert, layer, rows["layers"])
        return layer if _splits_columns(mesh) else families.joined(layer)

    def of_rest(rest: Params) -> Params:
        return jax.tree.map(convert, rest, {name: rows[name] for name in rest})

    if mesh is None:
        return jax.jit(of_layer), jax.jit(of_rest)
    where = decode_shardings(mesh, config)
    layer = where.pop("layers")[0]
    return jax.jit(of_layer, out_shardings=layer), jax.jit(of_rest, out_shardings=where)


def decode_shardings(mesh: Mesh, config: ModelConfig) -> Params:
    """Of each parameter of `decode_params`; heads that do not divide are replicated, as the cache
    is."""
    counted = families.counting_heads(config)

    def of(row: families.Parameter) -> NamedSharding:
        return sharding(mesh, row.axes, families.shape(row, counted))

    where = jax.tree.map(of, _rows(config))
    if not _splits_columns(mesh):
        where["layers"] = dict.fromkeys(families.block_shapes(config, True), sharding(mesh, (), ()))
    return where | {"layers": (where["layers"],) * config.num_layers}


def _splits_columns(mesh: Mesh | None) -> bool:
    return mesh is not None and mesh.shape["tensor"] > 1


def _rows(config: ModelConfig) -> Any:
    """The family's table in the structure of the parameters."""
    return families.by_path({row.path: row for row in families.parameters(config)})
