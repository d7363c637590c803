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
from srft_jax.rollout.cache import CacheShape, CacheWrites, empty_cache, shard_axes
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

Lowered = tuple[str, Any]  # name of a program, and what can be compiled


def row_sharded(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> Any:
    """Return an abstract array whose first axis is split by rows; a scalar is on every device."""
    axes = ("rows", *(len(shape) - 1) * [None]) if shape else ()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes, shape))


def abstract_sampler_state(
    config: ModelConfig, shape: CacheShape, mesh: Mesh, dtype: str
) -> SamplerState:
    """Return the abstract state of a sampler with a cache of this shape, on a decode mesh."""

    def make() -> SamplerState:
        return SamplerState(
            cache=empty_cache(config, shape, dtype),
            prompt_hidden=jnp.zeros((shape.prompts, config.dim), dtype),
            hidden=jnp.zeros((shape.rows, config.dim), dtype),
        )

    shapes = jax.eval_shape(make)
    where = jax.tree.map(lambda x: sharding(mesh, shard_axes(x), x.shape), shapes)
    return with_shardings(shapes, where)


def _packed_prompts(mesh: Mesh, shape: CacheShape, pass_rows: int, forced: bool) -> PackedPrompts:
    """Return the inputs of one prefill pass, each row as long as the longest prompt."""
    rows = row_shards(mesh) * pass_rows
    tokens = row_sharded(mesh, rows, shape.prompt_capacity)
    numbers = row_sharded(mesh, rows)
    writes = CacheWrites(row=numbers, start=numbers, length=numbers, prompt_slot=numbers)
    temperatures = row_sharded(mesh, rows, shape.prompt_capacity, dtype=jnp.float32)
    return PackedPrompts(
        tokens=tokens,
        positions=tokens,
        segment_ids=tokens,
        writes=writes,
        forced=tokens if forced else None,
        temperatures=temperatures if forced else None,
    )


def _row_inputs(mesh: Mesh, rows: int) -> RowInputs:
    numbers = row_sharded(mesh, rows)
    return RowInputs(
        draw_keys=row_sharded(mesh, rows, 2, dtype=jnp.uint32),
        groups=numbers,
        members=numbers,
        counts=numbers,
        limits=numbers,
        positions=numbers,
        stop_ids=row_sharded(mesh, rows, 4),
        temperatures=row_sharded(mesh, rows, dtype=jnp.float32),
        live=row_sharded(mesh, rows, dtype=bool),
    )


def abstract_decode_params(
    params: Params, config: ModelConfig, decoding: Mesh, dtype: str
) -> Params:
    """Return the sampler's parameters, laid out as `decode_layout.decode_params` makes them."""
    convert_layer, convert_rest = conversions(config, dtype, decoding)
    layers = (jax.eval_shape(convert_layer, params["layers"], 0),) * config.num_layers
    shapes = jax.eval_shape(convert_rest, _rest(params)) | {"layers": layers}
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
    forced: bool,
) -> Iterator[Lowered]:
    """Yield each program of the sampler, ready to be compiled.

    Args:
        params: Abstract parameters, as the trainer has them.
        config: Architecture.
        decoding: Mesh as it is laid out for decoding.
        shape: Shape of the cache over all devices.
        sampling: Temperature, truncation, precision, kernel.
        pass_rows: Rows of a prefill pass on each shard.
        forced: Whether some request forces tokens.
    """
    dtype, runtime = sampling.dtype, Runtime(dtype=sampling.dtype, attention=sampling.attention)
    decode_params = abstract_decode_params(params, config, decoding, dtype)
    state = abstract_sampler_state(config, shape, decoding, dtype)
    convert_layer, convert_rest = conversions(config, dtype, decoding)
    statics = Statics(config, runtime, sampling.truncation)
    with jax.set_mesh(decoding):
        yield "convert_layer", convert_layer.lower(params["layers"], 0)
        yield "convert_rest", convert_rest.lower(_rest(params))
        packed = _packed_prompts(decoding, shape, pass_rows, forced)
        # A prefill scans over the trainer's stacked layers.
        prefill_params = decode_params | {"layers": params["layers"]}
        yield "prefill", prefill.lower(prefill_params, state.prompts, packed, statics=statics)
        rows, enough = _row_inputs(decoding, shape.rows), row_sharded(decoding)
        yield "decode", decode.lower(decode_params, state, rows, enough, statics=statics)
