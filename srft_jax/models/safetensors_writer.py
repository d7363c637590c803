"""Safetensors files written tensor by tensor, from parameters on any sharding.

A parameter is split into Hugging Face's tensors on the devices; one of them at a time comes to the
host and goes into the open file, so that the size of the model does not matter. A file is the
length of its header, the header, and the tensors in its order; the library writes only what is in
memory as a whole.
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

# Most bytes of one file.
PART_BYTES = 5 * 2**30

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as safetensors calls them


def write_tensors(directory: epath.Path, config: ModelConfig, params: Params, dtype: str) -> None:
    """One model.safetensors; beyond PART_BYTES, parts and their index.

    All processes call this with their shards of the parameters; process 0 writes.

    Args:
        directory: To write to.
        config: Architecture; adapters are merged into the matrices that they stand beside.
        params: Of this architecture, on any sharding.
        dtype: Of the tensors: float32, float16 or bfloat16.

    Raises:
        UsageError: float16 does not reach to a value.
    """
    parts = _parts(_tensors(families.parameters(lora.base(config)), config, params, dtype))
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
    """Adapters alone, in one file; arguments and errors as of `write_tensors`."""
    rows = [row for row in families.parameters(config) if row.is_adapter]
    _write_part(file, _tensors(rows, config, params, dtype))


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One of Hugging Face's tensors and where it is to be taken from."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: jax.Array
    adapter: tuple[jax.Array, ...]  # the two factors that are to be merged into it, or none
    scale: float  # of their product
    place: tuple[int, ...]
    transpose: bool

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize

    def read(self) -> np.ndarray:
        """The tensor on the host; all processes take part.

        Raises:
            UsageError: float16 does not reach to one of its values.
        """
        arrays = (self.parameter, *self.adapter)
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
    for number in place:
        arrays = tuple(jax.lax.dynamic_index_in_dim(x, number, keepdims=False) for x in arrays)
    tensor, *adapter = arrays
    if adapter:
        a, b = adapter
        tensor = lora.merged(tensor, a, b, scale)
    return (tensor.T if transpose else tensor).astype(dtype)


def _tensors(
    rows: Sequence[families.Parameter], config: ModelConfig, params: Params, dtype: str
) -> list[_Tensor]:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    adapter_names = {row.path: families.adapter_names(row.path) for row in rows}
    return [
        _Tensor(
            name,
            families.hf_shape(row, config),
            dtype,
            flat[row.path],
            tuple(flat[path] for path in adapter_names[row.path] if path in flat),
            config.lora.scale if isinstance(config, AdaptedModelConfig) else 0.0,
            place,
            row.transpose,
        )
        for row in rows
        for name, place in families.hf_names(row, config).items()
    ]


def _parts(tensors: Sequence[_Tensor]) -> list[list[_Tensor]]:
    """In order, as many to a part as fit PART_BYTES, but at least one."""
    parts: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.num_bytes > PART_BYTES:
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
    # "pt": the layout is PyTorch's; transformers refuses files that do not say so.
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in part:
        start, end = end, end + tensor.num_bytes
        content[tensor.name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(content).encode()
    return text + b" " * (-len(text) % 8)  # so that the tensors start at a multiple of eight


def _opened(file: epath.Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """To write to; the other processes gather along, for nothing."""
    return file.open("wb") if jax.process_index() == 0 else open(os.devnull, "wb")
