"""The tensors of a local Hugging Face directory, found by name and read slice by slice."""

import dataclasses
from pathlib import Path

import numpy as np
import safetensors

from srft_jax.config import UsageError
from srft_jax.models.hf_json import read_json

# safetensors' name of a dtype that weights may have -> the dtype that their export is written in.
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Ends of the names of buffers that old checkpoints hold: no weights, transformers computes them.
_BUFFERS = (".rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file; its values are not in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    stored_as: str  # safetensors' name of its dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Copy a slice of the tensor, by default all of it.

        The file is mapped during the call only: pages that were read count as the process's memory
        until the mapping ends.
        """
        with safetensors.safe_open(self.file, framework="numpy") as handle:
            return handle.get_slice(self.name)[index or slice(None)]


def are_equal(tensor: StoredTensor, other: StoredTensor, *, rows_at_a_time: int = 4096) -> bool:
    """Compare two tensors bit for bit, a few rows of both in memory at a time."""
    if (tensor.shape, tensor.stored_as) != (other.shape, other.stored_as):
        return False
    starts = range(0, tensor.shape[0], rows_at_a_time)
    # The last slice may end at the last row only: safetensors refuses one that goes beyond.
    ends = (min(start + rows_at_a_time, tensor.shape[0]) for start in starts)
    rows = ((slice(start, end),) for start, end in zip(starts, ends, strict=True))
    return all(tensor.read(index).tobytes() == other.read(index).tobytes() for index in rows)


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Find all tensors, by name, in model.safetensors or in the shards that the index names.

    Raises:
        UsageError: no weights, files that cannot be read, a name that stands in two of them, an
            index that names other tensors than its files hold, or dtypes that are not floats of
            16, 32 or 64 bits.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        tensors = _with_tensors_of(single, {})
    elif index.is_file():
        tensors = _find_indexed(directory, index)
    else:
        raise UsageError(f"{directory} holds neither {single.name} nor {index.name}")
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
    stored_as = {name: tensor.stored_as for name, tensor in weights.items()}
    if odd := [f"{name} {dtype}" for name, dtype in stored_as.items() if dtype not in DTYPES]:
        raise UsageError(
            f"{directory} has {listing('of a dtype that is not read', odd)}; the dtypes of weights "
            f"are {', '.join(DTYPES)}"
        )
    return weights


def _find_indexed(directory: Path, index: Path) -> dict[str, StoredTensor]:
    """The tensors of all files in the index, which must name each tensor's file and no other."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(x) is str for x in weight_map.values()):
        raise UsageError(f"{index} has no weight_map, from each tensor's name to its file")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors = _with_tensors_of(directory / name, tensors)
    files = {name: tensor.file.name for name, tensor in tensors.items()}
    misplaced = [
        f"{name} in {weight_map.get(name)} (found in {files.get(name)})"
        for name in sorted(weight_map.keys() | files)
        if weight_map.get(name) != files.get(name)
    ]
    if misplaced:
        raise UsageError(f"{index} does not fit its files: {listing('misplaced', misplaced)}")
    return tensors


def _with_tensors_of(file: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` and those of one file, whose header is read and checked against its length."""
    in_file = {}
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            for name in handle.keys():
                header = handle.get_slice(name)
                in_file[name] = StoredTensor(
                    file, name, tuple(header.get_shape()), header.get_dtype()
                )
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if twice := sorted(tensors.keys() & in_file):
        raise UsageError(f"{file.parent} holds {twice[0]} twice, the second time in {file.name}")
    return tensors | in_file


def stored_dtype(directory: Path) -> str:
    """Return the dtype of the stored weights; float32, which holds all others, if they differ."""
    dtypes = {DTYPES[tensor.stored_as] for tensor in find_tensors(directory).values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def listing(what: str, items: list[str], most: int = 4) -> str:
    """Write a count and the first few items, or nothing for none.

    In: "missing", ["a", "b", "c", "d", "e"].  Out: "5 missing: a, b, c, d and 1 more".
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{len(items)} {what}: {', '.join(items[:most])}{more}" if items else ""
