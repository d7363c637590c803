"""Weights from local Hugging Face directories; nothing is downloaded.

The family's table gives every name, shape and transpose. `hf_export` is the way back; checkpoints
of a run are written by training/checkpoint.py.
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
from srft_jax.models.safetensors_reader import StoredTensor, find_tensors, listing

# Rows that are read side by side where two tensors are compared.
_COMPARED_ROWS = 4096


def load_hf(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[ModelConfig, Params]:
    """Reads a Hugging Face directory, tensor by tensor, each straight onto its shards.

    Beyond the parameters, the host holds one tensor as it is stored and, on a CPU, once more as the
    device's; measured by benchmarks/import_hf.py.

    Args:
        path: Local directory with config.json and model.safetensors, or shards with their index;
            float16, bfloat16, float32 or float64.
        mesh: Put each parameter straight onto its sharding; a process reads only the blocks that
            its devices hold.
        dtype: Of the parameters; None is float32, the master weights.

    Returns:
        The architecture, and parameters shaped as by `init_params`, layers stacked on axis 0.

    Raises:
        UsageError: no such model, one that we would compute wrongly, tensors that do not fit
            config.json, or a dtype that the device lacks.
    """
    directory, kind = Path(path), _parameter_dtype(dtype)
    config = read_config(directory)
    tensors = find_tensors(directory)
    rows = families.parameters(config)
    tensors = _without_tied_head(tensors, config, directory)
    _check_tensors(tensors, config, directory)
    flat = {row.path: _read_parameter(tensors, row, config, mesh, kind) for row in rows}
    return config, families.by_path(flat)


def _parameter_dtype(dtype: str | None) -> np.dtype:
    kind = jnp.dtype(dtype or "float32")
    if not jnp.issubdtype(kind, jnp.floating):
        raise UsageError(f"parameters cannot be of dtype {kind}, which is not a float")
    if jax.dtypes.canonicalize_dtype(kind) != kind:
        raise UsageError(f"parameters of dtype {kind} need JAX's 64-bit mode: JAX_ENABLE_X64=1")
    return kind


def _without_tied_head(
    tensors: dict[str, StoredTensor], config: ModelConfig, directory: Path
) -> dict[str, StoredTensor]:
    """Some tied models are stored with their head, too: a copy of the embedding is left out."""
    untied = dataclasses.replace(config, tie_embeddings=False)
    names = {row.path: row.hf_name for row in families.parameters(untied)}
    head, embedding = names["head"], names["embedding"]
    if not config.tie_embeddings or not {head, embedding} <= tensors.keys():
        return tensors
    if not _are_equal(tensors[head], tensors[embedding]):
        raise UsageError(
            f"{directory} has a {head} that differs from {embedding}, although its config.json "
            "ties them (tie_word_embeddings)"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Bit for bit."""
    if (one.shape, one.kind) != (other.shape, other.kind):
        return False
    num_rows = one.shape[0]
    starts = range(0, num_rows, _COMPARED_ROWS)
    blocks = ((slice(start, min(start + _COMPARED_ROWS, num_rows)),) for start in starts)
    return all(one.read(block).tobytes() == other.read(block).tobytes() for block in blocks)


def _check_tensors(tensors: dict[str, StoredTensor], config: ModelConfig, directory: Path) -> None:
    expected = {
        name: families.hf_shape(row, config)
        for row in families.parameters(config)
        for name in families.hf_names(row, config)
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        listing("missing", [f"{name} {expected[name]}" for name in expected if name not in found]),
        listing("unknown", [f"{name} {found[name]}" for name in found if name not in expected]),
        listing("misshapen", misshapen),
    ]
    if any(problems):
        raise UsageError(
            f"{directory} does not fit its config.json: {'; '.join(filter(None, problems))}"
        )


def _read_parameter(
    tensors: dict[str, StoredTensor],
    row: families.Parameter,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: np.dtype,
) -> jax.Array:
    """Made once on its shards, then filled in place: layers are never gathered on the host."""
    shape = families.stacked_shape(row, config)
    counted = families.counting_heads(config)
    where = _where(mesh, row.stacked_axes, families.stacked_shape(row, counted))
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)
    fill = jax.jit(_with_tensor, static_argnums=3, donate_argnums=0, out_shardings=where)
    of_tensor = _where(mesh, families.hf_axes(row), families.hf_shape(row, counted))
    whole = zeros(shape, dtype)
    for name, place in families.hf_names(row, config).items():
        tensor = _put(tensors[name], of_tensor)
        # Waits, or the next tensor would be read while this one is still on its way.
        whole = jax.block_until_ready(fill(whole, tensor, place, row.transpose))
    return whole


def _where(mesh: Mesh | None, axes: Sequence[str], shape: Sequence[int]) -> Sharding | None:
    return None if mesh is None else sharding(mesh, axes, shape)


def _put(stored: StoredTensor, where: Sharding | None) -> jax.Array:
    """A tensor as it is stored, on its shards; float64 as float32 where the device lacks it."""
    blocks: dict[str, np.ndarray] = {}  # replicas share theirs

    def read(block: tuple[slice, ...] | None) -> np.ndarray:
        if str(block) not in blocks:
            blocks[str(block)] = stored.read(block or ())  # None, too, is the whole
        return blocks[str(block)]

    if where is None:
        return jax.device_put(read(None))
    return jax.make_array_from_callback(stored.shape, where, read)


def _with_tensor(
    whole: jax.Array, tensor: jax.Array, place: tuple[jax.Array, ...], transpose: bool
) -> jax.Array:
    """`whole` with a tensor of Hugging Face's at this place of its leading axes."""
    tensor = (tensor.T if transpose else tensor).astype(whole.dtype)
    leading = (None,) * len(place)
    return jax.lax.dynamic_update_slice(whole, tensor[leading], [*place, *[0] * tensor.ndim])
