"""Import of local Hugging Face directories; nothing is downloaded.

The family's table gives every name, shape and transpose. hf_export.py is the way back; the
checkpoints of a run are training/checkpoint.py's.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from srft_jax.config import ModelConfig, UsageError
from srft_jax.mesh import sharding
from srft_jax.models import families
from srft_jax.models.decoder import Params
from srft_jax.models.hf_config import read_config
from srft_jax.models.safetensors_reader import (
    StoredTensor,
    are_equal,
    find_tensors,
    listing,
)


def load_hf(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face directory, tensor by tensor, each straight onto its shards.

    Beyond the parameters, the host holds one tensor as it is stored and, on a CPU, once more as the
    device's; benchmarks/import_hf.py measures it.

    Args:
        path: Local directory with config.json and model.safetensors, or shards with their index;
            float16, bfloat16, float32 or float64.
        mesh: Mesh to put each parameter on; a process reads only the slices that its devices hold.
        dtype: Type of the parameters; None is float32, the master weights.

    Returns:
        The architecture, and parameters shaped as by `init_params`, layers stacked on axis 0.

    Raises:
        UsageError: no such model, one that we would compute wrongly, tensors that do not fit
            config.json, or a dtype that the device lacks.
    """
    directory, param_dtype = Path(path), _parameter_dtype(dtype)
    config = read_config(directory)
    tensors = _without_tied_head(find_tensors(directory), config, directory)
    _check_tensors(tensors, config, directory)
    flat = {
        parameter.path: _read_parameter(tensors, parameter, config, mesh, param_dtype)
        for parameter in families.parameters(config)
    }
    return config, families.by_path(flat)


def _parameter_dtype(name: str | None) -> np.dtype:
    dtype = jnp.dtype(name or "float32")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UsageError(f"parameters cannot be of dtype {dtype}, which is not a float")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise UsageError(f"parameters of dtype {dtype} need JAX's 64-bit mode: JAX_ENABLE_X64=1")
    return dtype


def _without_tied_head(
    tensors: dict[str, StoredTensor], config: ModelConfig, directory: Path
) -> dict[str, StoredTensor]:
    """The tensors without the head that some tied models store too: a copy of the embedding."""
    # The head's name stands only in the table of an untied model.
    untied = dataclasses.replace(config, tie_embeddings=False)
    names = {parameter.path: parameter.hf_name for parameter in families.parameters(untied)}
    head, embedding = names["head"], names["embedding"]
    if not config.tie_embeddings or not {head, embedding} <= tensors.keys():
        return tensors
    if not are_equal(tensors[head], tensors[embedding]):
        raise UsageError(
            f"{directory} has a {head} that differs from {embedding}, although its config.json "
            "ties them (tie_word_embeddings)"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _check_tensors(tensors: dict[str, StoredTensor], config: ModelConfig, directory: Path) -> None:
    """Raise on tensors that are missing, unknown or misshapen, each with its shape."""
    expected = {
        name: families.hf_shape(parameter, config)
        for parameter in families.parameters(config)
        for name in families.hf_names(parameter, config)
    }
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    missing = [f"{name} {expected[name]}" for name in expected if name not in stored]
    unknown = [f"{name} {stored[name]}" for name in stored if name not in expected]
    misshapen = [
        f"{name} {stored[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    problems = [
        listing("missing", missing),
        listing("unknown", unknown),
        listing("misshapen", misshapen),
    ]
    if any(problems):
        raise UsageError(
            f"{directory} does not fit its config.json: {'; '.join(filter(None, problems))}"
        )


def _read_parameter(
    tensors: dict[str, StoredTensor],
    parameter: families.Parameter,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: np.dtype,
) -> jax.Array:
    """One parameter of all layers: made once on its shards, then filled in place.

    So the layers of a parameter are never gathered on the host.
    """
    whole_heads = families.counting_heads(config)
    on_shards = _sharding(
        mesh, parameter.stacked_axes, families.stacked_shape(parameter, whole_heads)
    )
    tensor_shards = _sharding(
        mesh, families.hf_axes(parameter), families.hf_shape(parameter, whole_heads)
    )
    # Compiled once a parameter: `fill` puts each layer's tensor in place without a copy (donated).
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=on_shards)
    fill = jax.jit(_with_tensor, static_argnums=3, donate_argnums=0, out_shardings=on_shards)
    stacked = zeros(families.stacked_shape(parameter, config), dtype)
    for name, place in families.hf_names(parameter, config).items():
        tensor = _put(tensors[name], tensor_shards)
        # Without waiting, the next tensor would be read while this one is still on its way.
        stacked = jax.block_until_ready(fill(stacked, tensor, place, parameter.transpose))
    return stacked


def _sharding(mesh: Mesh | None, axes: Sequence[str], shape: Sequence[int]) -> Sharding | None:
    return None if mesh is None else sharding(mesh, axes, shape)


def _put(stored: StoredTensor, on_shards: Sharding | None) -> jax.Array:
    """A tensor as it is stored, on its shards; float64 as float32 where the device lacks it."""
    slices_read: dict[str, np.ndarray] = {}  # replicas hold the same slice, which is read once

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in slices_read:
            slices_read[str(index)] = stored.read(index)
        return slices_read[str(index)]

    if on_shards is None:
        return jax.device_put(stored.read())
    # JAX calls with None for the whole of an array.
    return jax.make_array_from_callback(stored.shape, on_shards, lambda index: read(index or ()))


def _with_tensor(
    stacked: jax.Array, tensor: jax.Array, place: tuple[jax.Array, ...], transpose: bool
) -> jax.Array:
    """`stacked` with one of Hugging Face's tensors at this place of its leading axes."""
    tensor = (tensor.T if transpose else tensor).astype(stacked.dtype)
    leading = (None,) * len(place)
    return jax.lax.dynamic_update_slice(stacked, tensor[leading], [*place, *[0] * tensor.ndim])
