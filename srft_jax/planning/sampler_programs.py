"""The sampler's programs as a run compiles them, lowered from abstract shapes."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from srft_jax.config import ModelConfig
from srft_jax.mesh import row_shards, sharding
from srft_jax.models.decoder import Params, Runtime
from srft_jax.rollout import SamplingConfig
from srft_jax.rollout.cache import CacheShape, Places, empty_cache, shard_axes
from srft_jax.rollout.decode_layout import conversions, decode_shardings
from srft_jax.rollout.programs import (
    PackedPrompts,
    RowInputs,
    SamplerState,
    Statics,
    decode,
    prefill,
)
from srft_jax.training.state import with_shardings

Lowered = tuple[str, Any]  # a program's name, and what can be compiled


def of_rows(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> Any:
    """An abstract array split by rows; a scalar is everywhere."""
    where = sharding(mesh, ("rows", *(len(shape) - 1) * [None]) if shape else (), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def abstract_sampler_state(
    config: ModelConfig, shape: CacheShape, mesh: Mesh, dtype: str
) -> SamplerState:
    """A cache of this shape and what goes with it, on a decode mesh."""

    def make() -> SamplerState:
        return SamplerState(
            empty_cache(config, shape, dtype),
            jnp.zeros((shape.prompts, config.dim), dtype),
            jnp.zeros((shape.rows, config.dim), dtype),
        )

    shapes = jax.eval_shape(make)
    where = jax.tree.map(lambda x: sharding(mesh, shard_axes(x), x.shape), shapes)
    return with_shardings(shapes, where)


def _packed_prompts(mesh: Mesh, shape: CacheShape, pass_rows: int, forced: bool) -> PackedPrompts:
    """One pass: so many rows on each shard, as long as the longest prompt."""
    rows = row_shards(mesh) * pass_rows
    tokens = of_rows(mesh, rows, shape.prompt_capacity)
    places = Places(*4 * [of_rows(mesh, rows)])
    temperatures = of_rows(mesh, rows, shape.prompt_capacity, dtype=jnp.float32)
    return PackedPrompts(
        tokens,
        tokens,
        tokens,
        places,
        forced=tokens if forced else None,
        temperatures=temperatures if forced else None,
    )


def _row_inputs(mesh: Mesh, rows: int) -> RowInputs:
    of_row = of_rows(mesh, rows)
    return RowInputs(
        keys=of_rows(mesh, rows, 2, dtype=jnp.uint32),
        groups=of_row,
        members=of_row,
        counts=of_row,
        limits=of_row,
        positions=of_row,
        stop_ids=of_rows(mesh, rows, 4),
        temperatures=of_rows(mesh, rows, dtype=jnp.float32),
        live=of_rows(mesh, rows, dtype=bool),
    )


def abstract_decode_params(
    params: Params, config: ModelConfig, decoding: Mesh, dtype: str
) -> Params:
    """As `rollout.decode_layout.decode_params` makes them of the trainer's."""
    of_layer, of_rest = conversions(config, dtype, decoding)
    rest = _rest(params)
    layers = (jax.eval_shape(of_layer, params["layers"], 0),) * config.num_layers
    shapes = jax.eval_shape(of_rest, rest) | {"layers": layers}
    return with_shardings(shapes, decode_shardings(decoding, config))


def _rest(params: Params) -> Params:
    return {name: leaf for name, leaf in params.items() if name != "layers"}


def lowered_sampler(
    params: Params,
    config: ModelConfig,
    decoding: Mesh,
    shape: CacheShape,
    *,
    sampling: SamplingConfig,
    pass_rows: int,
    forced: bool = False,
) -> Iterator[Lowered]:
    """Each program, ready to be compiled.

    Args:
        params: Abstract, as the trainer has them.
        config: Architecture.
        decoding: The mesh as it is laid out for decoding.
        shape: Of the cache, over all devices.
        sampling: Temperature, truncation, precision, kernel.
        pass_rows: Of a prefill, on each shard of rows.
        forced: Some request forces tokens.
    """
    dtype, runtime = sampling.dtype, Runtime(dtype=sampling.dtype, attention=sampling.attention)
    of_decode = abstract_decode_params(params, config, decoding, dtype)
    state = abstract_sampler_state(config, shape, decoding, dtype)
    of_layer, of_rest = conversions(config, dtype, decoding)
    statics = Statics(config, runtime, sampling.truncation)
    with jax.set_mesh(decoding):
        yield "convert_layer", of_layer.lower(params["layers"], 0)
        yield "convert_rest", of_rest.lower(_rest(params))
        packed = _packed_prompts(decoding, shape, pass_rows, forced)
        of_prefill = of_decode | {"layers": params["layers"]}
        yield "prefill", prefill.lower(of_prefill, state.prompts, packed, statics=statics)
        rows, enough = _row_inputs(decoding, shape.rows), of_rows(decoding)
        yield "decode", decode.lower(of_decode, state, rows, enough, statics=statics)
