"""Weights to Hugging Face directories, local or on an object store (gs://).

A parameter is split into Hugging Face's tensors on the devices; one of them at a time comes to the
host and goes into the open file, so that the size of the model does not matter. Everything is
written to a sibling directory first and renamed at the end: a killed export leaves what was there.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from srft_jax.config import ModelConfig, UsageError
from srft_jax.models import families
from srft_jax.models.config_hf import read_config, write_json
from srft_jax.models.decoder import Params
from srft_jax.models.files_hf import copy_model_files, stated_dtype, write_model_files

if TYPE_CHECKING:  # its import costs a second that training from random weights need not pay
    from srft_jax.models.tokenizer import Tokenizer

# Most bytes of one file of an export.
PART_BYTES = 5 * 2**30

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as safetensors calls them


def save_hf(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    params: Params,
    tokenizer: "Tokenizer | None" = None,
    *,
    dtype: str = "float32",
) -> None:
    """Writes a Hugging Face directory that transformers and `load_hf` read.

    All processes call this with their shards of the parameters; process 0 writes.

    Args:
        path: Directory to make; an earlier model there is replaced.
        model_config: Architecture.
        params: As made by `init_params`, on any sharding.
        tokenizer: Exported along, with its chat template and the ids of its special tokens.
        dtype: Of the tensors written.

    Raises:
        UsageError: `path` holds something that is not a model, or a weight is beyond float16.
        ValueError: `params` are not of this architecture.
    """
    _check_params(model_config, params)
    with _replaced_directory(path) as directory:
        if jax.process_index() == 0:
            write_model_files(directory, model_config, tokenizer, dtype=dtype)
        _write_tensors(directory, model_config, params, dtype)


def export_hf(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    params: Params,
    *,
    dtype: str | None = None,
) -> None:
    """`save_hf` with all but the weights from `source`, where `write_model_files` left it.

    Args:
        path: Directory to make; an earlier model there is replaced.
        source: Directory with config.json and what else an export has beside its weights.
        params: Of the architecture in config.json.
        dtype: Of the tensors written; None is what config.json says.

    Raises:
        UsageError, ValueError: as `save_hf`.
    """
    files = epath.Path(source)
    model_config, dtype = read_config(files), dtype or stated_dtype(files)
    _check_params(model_config, params)
    with _replaced_directory(path) as directory:
        if jax.process_index() == 0:
            copy_model_files(files, directory, dtype)
        _write_tensors(directory, model_config, params, dtype)


def _check_params(config: ModelConfig, params: Params) -> None:
    """A head that config calls tied would be dropped in silence."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    found = {path: leaf.shape for path, leaf in flat.items()}
    expected = {
        row.path: families.stacked_shape(row, config) for row in families.parameters(config)
    }
    if found != expected:
        wrong = {path: (found.get(path), expected.get(path)) for path in sorted(found | expected)}
        wrong = {path: pair for path, pair in wrong.items() if pair[0] != pair[1]}
        raise ValueError(f"params do not fit model_config; parameter: (found, expected) = {wrong}")


# Tensors, and the files that they go to. A safetensors file is the length of its header, the
# header, and the tensors in its order; the library writes only what is in memory as a whole.


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One of Hugging Face's tensors and where it is to be taken from."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: jax.Array
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
        tensor = _taken(self.parameter, self.place, self.transpose, self.dtype)
        if tensor.is_fully_addressable:
            values = np.asarray(tensor)
        else:
            values = multihost_utils.process_allgather(tensor, tiled=True)
        if self.dtype == "float16" and np.isinf(values).any():
            raise UsageError(f"{self.name} has values beyond float16; export in another dtype")
        return values


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def _taken(parameter: jax.Array, place: tuple[Any, ...], transpose: bool, dtype: str) -> jax.Array:
    tensor = parameter
    for number in place:
        tensor = jax.lax.dynamic_index_in_dim(tensor, number, keepdims=False)
    return (tensor.T if transpose else tensor).astype(dtype)


def _write_tensors(directory: epath.Path, config: ModelConfig, params: Params, dtype: str) -> None:
    """One model.safetensors; beyond PART_BYTES, parts and their index."""
    parts = _parts(_tensors(config, params, dtype))
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


def _tensors(config: ModelConfig, params: Params, dtype: str) -> list[_Tensor]:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return [
        _Tensor(name, families.hf_shape(row, config), dtype, flat[row.path], place, row.transpose)
        for row in families.parameters(config)
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


# The directory.


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises UsageError where an export to `path` would overwrite what is not a model."""
    target = epath.Path(path)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not (target / "config.json").exists() and not empty:
        raise UsageError(f"{path} exists and is not a Hugging Face model, so it is not overwritten")


@contextlib.contextmanager
def _replaced_directory(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A directory that process 0 makes, and that becomes `path` when the block ends well.

    What a killed export left behind is cleared by the next one. Object stores rename file by file:
    there, the two renamings are what must not be killed.
    """
    check_target(path)
    target = epath.Path(path).resolve()
    partial = target.with_name(f".{target.name}.export")
    replaced = target.with_name(f".{target.name}.replaced")
    if jax.process_index() == 0:
        for leftover in (partial, replaced):
            if leftover.exists():
                leftover.rmtree()
        partial.mkdir(parents=True)
    yield partial
    if jax.process_index() == 0:
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        if replaced.exists():
            replaced.rmtree()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {target.name}")
