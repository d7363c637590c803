"""The tensors of a local Hugging Face directory, found by name and read block by block."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from srft_jax.config import UsageError
from srft_jax.models.hf_json import read_json

# What safetensors calls the dtypes that weights come in -> what an export of them is written in.
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Buffers that old checkpoints hold and transformers computes anew: not weights.
_BUFFERS = (".rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies; nothing of it is in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # its dtype, as safetensors calls it

    def read(self, block: tuple[slice, ...] = ()) -> np.ndarray:
        """A copy of a block.

        The file is mapped for so long only: pages that were read count as memory of the process
        until the mapping goes.
        """
        with safetensors.safe_open(self.file, framework="numpy") as handle:
            return handle.get_slice(self.name)[block or slice(None)]


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Name -> tensor, of model.safetensors or of the shards that the index names.

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
    tensors = {name: one for name, one in tensors.items() if not name.endswith(_BUFFERS)}
    if odd := [f"{name} {one.kind}" for name, one in tensors.items() if one.kind not in DTYPES]:
        raise UsageError(
            f"{directory} has {listing('of a dtype that is not read', odd)}; the dtypes of weights "
            f"are {', '.join(DTYPES)}"
        )
    return tensors


def _find_indexed(directory: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(type(x) is str for x in weight_map.values()):
        raise UsageError(f"{index} has no weight_map, from each tensor's name to its file")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors = _with_tensors_of(directory / name, tensors)
    found = {name: tensor.file.name for name, tensor in tensors.items()}
    wrong = [
        f"{name} in {weight_map.get(name)} (found in {found.get(name)})"
        for name in sorted(weight_map.keys() | found)
        if weight_map.get(name) != found.get(name)
    ]
    if wrong:
        raise UsageError(f"{index} does not fit its files: {listing('misplaced', wrong)}")
    return tensors


def _with_tensors_of(file: Path, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`found` and the tensors of one file; its header is read and checked against its length."""
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            of_file = {name: _located(file, name, handle) for name in handle.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if twice := sorted(found.keys() & of_file):
        raise UsageError(f"{file.parent} holds {twice[0]} twice, the second time in {file.name}")
    return found | of_file


def _located(file: Path, name: str, handle: Any) -> StoredTensor:
    tensor = handle.get_slice(name)
    return StoredTensor(file, name, tuple(tensor.get_shape()), tensor.get_dtype())


def stored_dtype(directory: Path) -> str:
    """What the weights are stored in; float32, which holds all others, where they differ."""
    dtypes = {DTYPES[tensor.kind] for tensor in find_tensors(directory).values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def listing(what: str, items: list[str], most: int = 4) -> str:
    """In: "missing", ["a", "b", "c", "d", "e"].  Out: "5 missing: a, b, c, d and 1 more"."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{len(items)} {what}: {', '.join(items[:most])}{more}" if items else ""
