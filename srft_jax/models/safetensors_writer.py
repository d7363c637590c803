"""Safetensors files written tensor by tensor, from parameters on any sharding.

A parameter is split into Hugging Face's tensors on the devices; one tensor at a time comes to the
host and goes into the open file, so that the size of the model does not matter. (The safetensors
library writes only what is in memory as a whole.) A file is the length of its header, the header,
and the tensors in the header's order.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import IO, Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from srft_jax.config import AdaptedModelConfig, ModelConfig, UsageError
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params
from srft_jax.models.hf_json import write_json

PART_BYTES = 5 * 2**30  # Hugging Face's largest file, too

# dtype -> safetensors' name of it.
_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tensors(
    directory: epath.Path,
    config: ModelConfig,
    params: Params,
    dtype: str,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write one model.safetensors or, beyond `part_bytes`, parts and their index.

    All processes call this with their shards of the parameters; process 0 writes.

    Args:
        directory: Directory to write to.
        config: Architecture; adapters are merged into the matrices that they stand beside.
        params: Parameters of this architecture, on any sharding.
        dtype: Type of the tensors: float32, float16 or bfloat16.
        part_bytes: Largest size of one file; a tensor above it has a file of its own.

    Raises:
        UsageError: a value is too large for float16.
    """
    tensors = _tensors(families.parameters(lora.base(config)), config, params, dtype)
    parts = _parts(tensors, part_bytes)
    if len(parts) == 1:
        _write_part(directory / "model.safetensors", parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_part(directory / file, part)
        weight_map |= {tensor.name: file for tensor in part}
    total = sum(tensor.num_bytes for part in parts for tensor in part)
    if jax.process_index() == 0:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def write_adapters(
    file: epath.Path, config: AdaptedModelConfig, params: Params, dtype: str
) -> None:
    """Write adapters alone to one file; arguments and errors are those of `write_tensors`."""
    adapters = [entry for entry in families.parameters(config) if entry.is_adapter]
    _write_part(file, _tensors(adapters, config, params, dtype))


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One of Hugging Face's tensors and the arrays that it is computed from."""

    name: str
    shape: tuple[int, ...]  # as stored
    dtype: str
    array: jax.Array  # the parameter, of all layers and experts
    adapter: tuple[jax.Array, ...]  # the two factors to merge into it, or none
    scale: float  # multiplies their product
    place: tuple[int, ...]  # of the tensor on the leading axes of the arrays
    transpose: bool  # whether the matrix is stored transposed

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize

    def read(self) -> np.ndarray:
        """Bring the tensor to the host; all processes take part.

        Raises:
            UsageError: a value is too large for float16.
        """
        arrays = (self.array, *self.adapter)
        tensor = _taken(arrays, self.place, self.scale, self.transpose, self.dtype)
        if tensor.is_fully_addressable:
            values = np.asarray(tensor)
        else:
            values = multihost_utils.process_allgather(tensor, tiled=True)
        if self.dtype == "float16" and np.isinf(values).any():
            raise UsageError(f"{self.name} has values beyond float16; export in another dtype")
        return values


@functools.partial(jax.jit, static_argnames=("scale", "transpose", "dtype"))
def _taken(
    arrays: tuple[jax.Array, ...],
    place: tuple[Any, ...],
    scale: float,
    transpose: bool,
    dtype: str,
) -> jax.Array:
    """The tensor at this place of a parameter and its adapter, as Hugging Face stores it."""
    for number in place:  # the layer, and then the expert
        arrays = tuple(jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in arrays)
    tensor, *adapter = arrays
    if adapter:
        a, b = adapter
        tensor = lora.merged(tensor, a, b, scale)
    return (tensor.T if transpose else tensor).astype(dtype)


def _tensors(
    table: Sequence[families.Parameter], config: ModelConfig, params: Params, dtype: str
) -> list[_Tensor]:
    """All tensors of these parameters, in the table's order."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    factors = {entry.path: families.adapter_names(entry.path) for entry in table}
    return [
        _Tensor(
            name=name,
            shape=families.hf_shape(entry, config),
            dtype=dtype,
            array=flat[entry.path],
            adapter=tuple(flat[path] for path in factors[entry.path] if path in flat),
            scale=config.lora.scale if isinstance(config, AdaptedModelConfig) else 0.0,
            place=place,
            transpose=entry.transpose,
        )
        for entry in table
        for name, place in families.hf_names(entry, config).items()
    ]


def _parts(tensors: Sequence[_Tensor], part_bytes: int) -> list[list[_Tensor]]:
    """The tensors in order, parted: as many as fit `part_bytes` each, but at least one.

    In: tensors of 3, 3, 3, 9 and 1 bytes, 6 bytes a part.  Out: [3, 3], [3], [9], [1].
    """
    parts: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.num_bytes > part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.num_bytes
    return parts


def _write_part(file: epath.Path, part: Sequence[_Tensor]) -> None:
    header = _header(part)
    with _opened(file) as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for tensor in part:
            stream.write(np.ascontiguousarray(tensor.read()).view(np.uint8).data)


def _header(part: Sequence[_Tensor]) -> bytes:
    """JSON with the type, shape and place of each tensor."""
    # "pt": the layout is PyTorch's; transformers refuses files that do not say so.
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in part:
        start, end = end, end + tensor.num_bytes
        content[tensor.name] = {
            "dtype": _STORED_AS[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(content).encode()
    return text + b" " * (-len(text) % 8)  # so that the tensors start at a multiple of eight


def _opened(file: epath.Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The file, opened by process 0; the other processes gather along and write to nothing."""
    return file.open("wb") if jax.process_index() == 0 else open(os.devnull, "wb")
