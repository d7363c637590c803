"""Weights from and to local Hugging Face directories; nothing is downloaded.

The family's table gives every name, shape and transpose. Checkpoints of a run are written by
training/checkpoint.py, not here.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from srft_jax.config import ModelConfig, UsageError
from srft_jax.mesh import sharding
from srft_jax.models import families, lora
from srft_jax.models.config_hf import read_config, read_json, to_hf_config, write_json
from srft_jax.models.decoder import Params

if TYPE_CHECKING:  # its import costs a second that training from random weights need not pay
    from srft_jax.models.tokenizer import Tokenizer

# Most bytes of one file of an export; the host holds as much, and one parameter more.
SHARD_BYTES = 5 * 2**30


def load_hf(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[ModelConfig, Params]:
    """Reads a Hugging Face directory, tensor by tensor.

    Args:
        path: Local directory with config.json and model.safetensors, or shards with their index.
        mesh: Put each parameter straight onto its sharding; a process reads only the blocks that
            its devices hold.
        dtype: Of the parameters; None is float32, the master weights.

    Returns:
        The architecture, and parameters shaped as by `init_params`, layers stacked on axis 0.

    Raises:
        UsageError: no such model, one that we would compute wrongly, or tensors that do not fit
            config.json.
    """
    directory = Path(path)
    config = read_config(directory)
    kind = jnp.dtype(dtype or "float32")
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(directory, stack)
        _check_tensors(tensors, config, directory)
        flat = {
            row.path: _read_parameter(tensors, row, config, mesh, kind)
            for row in families.parameters(config)
        }
    return config, flax.traverse_util.unflatten_dict(flat, sep="/")


def save_hf(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    params: Params,
    tokenizer: "Tokenizer | None" = None,
) -> None:
    """Writes a Hugging Face directory that transformers and `load_hf` read; weights are float32.

    Adapters are merged into the matrices that they stand beside.

    Everything is written to a sibling directory first and renamed at the end: a killed export
    leaves `path` as it was.

    Args:
        path: Directory to make; an earlier model there is replaced.
        model_config: Architecture.
        params: As made by `init_params`; all of it on devices of this process.
        tokenizer: Exported along, with its chat template and the ids of its special tokens.

    Raises:
        UsageError: `path` holds something that is not a model.
        ValueError: `params` are not of this architecture.
    """
    _check_params(model_config, params)
    with replaced_directory(Path(path)) as directory:
        _write_tensors(directory, _to_hf_tensors(model_config, params))
        ids: dict[str, int | None] = {}
        if tokenizer is not None:
            tokenizer.save(directory)
            ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
            write_json(directory / "generation_config.json", ids)
            ids["bos_token_id"] = tokenizer.bos_id
        write_json(directory / "config.json", to_hf_config(model_config) | ids)


# Tensors in. A safetensors slice has get_shape(); indexing it like an array reads the file.


def _open_tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name -> safetensors slice of every tensor; the files stay open as long as the stack."""
    tensors: dict[str, Any] = {}
    for file in _tensor_files(directory):
        try:
            handle = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except (safetensors.SafetensorError, FileNotFoundError) as error:
            raise UsageError(f"{file} cannot be read: {error}") from error
        for name in handle.keys():
            if name in tensors:
                raise UsageError(f"{directory} holds {name} twice, the second time in {file.name}")
            tensors[name] = handle.get_slice(name)
    return tensors


def _tensor_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    raise UsageError(f"{directory} holds neither {single.name} nor {index.name}")


def hf_names(row: families.Parameter, config: ModelConfig) -> list[str]:
    """One name a layer, in order; one name where the parameter is not stacked."""
    return [row.hf_name.format(layer=n) for n in range(config.num_layers if row.stacked else 1)]


def _check_tensors(tensors: dict[str, Any], config: ModelConfig, directory: Path) -> None:
    expected = {}
    for row in families.parameters(config):
        shape = families.shape(row, config)
        for name in hf_names(row, config):
            expected[name] = shape[::-1] if row.transpose else shape
    found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    misshapen = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        _problem("missing", [f"{name} {expected[name]}" for name in expected if name not in found]),
        _problem("unknown", [f"{name} {found[name]}" for name in found if name not in expected]),
        _problem("misshapen", misshapen),
    ]
    if any(problems):
        raise UsageError(
            f"{directory} does not fit its config.json: {'; '.join(filter(None, problems))}"
        )


def _problem(kind: str, tensors: list[str], most: int = 4) -> str:
    more = f" and {len(tensors) - most} more" if len(tensors) > most else ""
    return f"{len(tensors)} {kind}: {', '.join(tensors[:most])}{more}" if tensors else ""


def _read_parameter(
    tensors: dict[str, Any],
    row: families.Parameter,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: np.dtype,
) -> jax.Array:
    names = hf_names(row, config)
    shape = families.stacked_shape(row, config)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        """One block of the parameter, from the same block of each layer's tensor."""
        index = index or (slice(None),) * len(shape)  # None, too, is the whole
        within = index[1:] if row.stacked else index
        block = within[::-1] if row.transpose else within
        layers = [tensors[name][block] for name in (names[index[0]] if row.stacked else names)]
        layers = [layer.T if row.transpose else layer for layer in layers]
        stack = np.stack(layers, dtype=dtype, casting="unsafe")
        return stack if row.stacked else stack[0]

    if mesh is None:
        return jnp.asarray(read(None))
    return jax.make_array_from_callback(shape, sharding(mesh, row.stacked_axes, shape), read)


# Tensors out.


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


def _to_hf_tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for row in families.parameters(lora.base(config)):
        host = np.asarray(lora.merged(flat, row, config), np.float32)
        for name, tensor in zip(
            hf_names(row, config), host if row.stacked else [host], strict=True
        ):
            yield name, np.ascontiguousarray(tensor.T if row.transpose else tensor)


def _write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """One model.safetensors; beyond SHARD_BYTES, shards and their index."""
    sizes: list[dict[str, int]] = []  # of each shard: name -> bytes
    for number, shard in enumerate(_shards(tensors)):
        # "pt": the layout is PyTorch's; transformers refuses files that do not say so.
        part = directory / f"shard-{number}"
        safetensors.numpy.save_file(shard, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes files for their owner alone
        sizes.append({name: tensor.nbytes for name, tensor in shard.items()})
    if len(sizes) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(sizes):
        file = f"model-{number + 1:05d}-of-{len(sizes):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(sum(shard.values()) for shard in sizes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


@contextlib.contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """An empty directory that becomes `path` when the block ends well.

    What a killed export left behind is cleared by the next one.
    """
    path = path.resolve()
    if path.exists() and not _is_export(path):
        raise UsageError(f"{path} exists and is not a Hugging Face model, so it is not overwritten")
    partial = path.with_name(f".{path.name}.export")
    replaced = path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    if replaced.exists():
        shutil.rmtree(replaced)


def _is_export(path: Path) -> bool:
    """Of a model or of adapters, or an empty directory."""
    files = (path / name for name in ("config.json", "adapter_config.json"))
    return any(file.is_file() for file in files) or (path.is_dir() and not any(path.iterdir()))
