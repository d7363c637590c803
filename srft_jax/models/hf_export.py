"""Export of Hugging Face directories, local or on an object store (gs://).

An export is written to a sibling directory first and renamed at the end: a killed one leaves what
was there. A run keeps the files beside the weights of the model that it started from, so that each
of its checkpoints can be exported later, wherever that model is then.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import flax.traverse_util
import jax
from etils import epath
from jax.experimental import multihost_utils

from srft_jax.config import AdaptedModelConfig, LoraConfig, ModelConfig, UsageError
from srft_jax.config.paths import absolute
from srft_jax.models import families, lora
from srft_jax.models.decoder import Params
from srft_jax.models.hf_config import read_config, to_hf_config
from srft_jax.models.hf_json import read_json, write_json
from srft_jax.models.safetensors_writer import PART_BYTES, write_adapters, write_tensors

if TYPE_CHECKING:  # its import costs a second that training from random weights need not pay
    from srft_jax.models.tokenizer import Tokenizer


def save_hf(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    params: Params,
    tokenizer: "Tokenizer | None" = None,
    *,
    dtype: str = "float32",
    part_bytes: int = PART_BYTES,
) -> None:
    """Write a Hugging Face directory that transformers and `load_hf` read.

    All processes call this with their shards of the parameters; process 0 writes.

    Args:
        path: Directory to make; an earlier model there is replaced.
        model_config: Architecture.
        params: Parameters shaped as by `init_params`, on any sharding.
        tokenizer: Tokenizer to export with its chat template and the ids of its special tokens.
        dtype: Type of the tensors written.
        part_bytes: Largest size of one file of tensors.

    Raises:
        UsageError: `path` holds something that is not a model, or a weight is beyond float16.
        ValueError: `params` are not of this architecture.
    """
    _check_params(model_config, params)
    with _replaced_directory(path) as directory:
        if jax.process_index() == 0:
            write_model_files(directory, model_config, tokenizer, dtype=dtype)
        write_tensors(directory, model_config, params, dtype, part_bytes)


def export_hf(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    params: Params,
    *,
    lora_config: LoraConfig | None = None,
    dtype: str | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write weights as `save_hf` does, and beside them the files that `write_model_files` made.

    Args:
        path: Directory to make; an earlier model there is replaced.
        source: Directory with config.json and the other files of an export beside its weights.
        params: Parameters of the architecture in config.json.
        lora_config: Adapters among the parameters, which are merged.
        dtype: Type of the tensors written; None is what config.json says.
        part_bytes: Largest size of one file of tensors.

    Raises:
        UsageError, ValueError: as `save_hf`.
    """
    files = epath.Path(source)
    model_config = lora.adapted(read_config(files), lora_config)
    dtype = dtype or str(read_json(files / "config.json")["dtype"])
    _check_params(model_config, params)
    with _replaced_directory(path) as directory:
        if jax.process_index() == 0:
            _copy_model_files(files, directory, dtype)
        write_tensors(directory, model_config, params, dtype, part_bytes)


def save_peft(
    path: str | os.PathLike[str],
    config: AdaptedModelConfig,
    params: Params,
    base_path: str,
    *,
    dtype: str = "float32",
) -> None:
    """Write adapters alone, as a directory that `peft.PeftModel.from_pretrained` loads.

    All processes call this with their shards of the parameters; process 0 writes.

    Args:
        path: Directory to make; an earlier export there is replaced.
        config: Architecture with its adapters.
        params: Parameters of the adapters at least.
        base_path: Hugging Face directory of the model that the adapters belong to.
        dtype: Type of the tensors written.

    Raises:
        UsageError: `path` holds something that is not an export.
    """
    with _replaced_directory(path) as directory:
        write_adapters(directory / "adapter_model.safetensors", config, params, dtype)
        if jax.process_index() == 0:
            write_json(directory / "adapter_config.json", _peft_config(config, base_path))


def _check_params(config: ModelConfig, params: Params) -> None:
    """Raise where the table has other parameters: a head beside a tied embedding would be lost."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    table = families.parameters(config)
    expected = {parameter.path: families.stacked_shape(parameter, config) for parameter in table}
    if shapes != expected:
        pairs = {path: (shapes.get(path), expected.get(path)) for path in sorted(shapes | expected)}
        wrong = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
        raise ValueError(f"params do not fit model_config; parameter: (found, expected) = {wrong}")


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise UsageError if an export to `path` would overwrite something that is not a model."""
    target = epath.Path(path)
    empty = target.is_dir() and not any(target.iterdir())
    known = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not known and not empty:
        raise UsageError(f"{path} exists and is not a Hugging Face model, so it is not overwritten")


@contextlib.contextmanager
def _replaced_directory(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A directory that process 0 makes, and that becomes `path` when the `with` body ends well.

    The next export clears what a killed one left behind, or puts it back in its place. Object
    stores rename file by file: there a kill between or during the two renamings does harm.
    """
    check_target(path)
    target = absolute(path)
    partial = target.with_name(f".{target.name}.export")
    replaced = target.with_name(f".{target.name}.replaced")
    if jax.process_index() == 0:
        if replaced.exists() and not target.exists():  # killed between the two renamings
            replaced.rename(target)
        for leftover in (partial, replaced):
            if leftover.exists():
                leftover.rmtree()
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"{path} cannot be made: {error.strerror or error}") from error
    yield partial
    # Only here does `path` change. First the old model steps aside, so that it can come back.
    if jax.process_index() == 0:
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        if replaced.exists():
            replaced.rmtree()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {target.name}")


def write_model_files(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    tokenizer: "Tokenizer | None",
    *,
    dtype: str,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Write config.json and, with a tokenizer, its files and generation_config.json.

    Args:
        path: Directory; made if there is none.
        model_config: Architecture.
        tokenizer: Tokenizer, whose files are copied as they are.
        dtype: Type of the weights, as config.json is to state it.
        source: Directory of the model that this one comes from, whose sampling defaults stay.
    """
    directory = epath.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    config = to_hf_config(model_config)
    if tokenizer is not None:
        tokenizer.save(directory)
        config |= {
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.bos_id,
        }
        generation = _generation(source, tokenizer.stop_ids, tokenizer.pad_id)
        write_json(directory / "generation_config.json", generation)
    write_json(directory / "config.json", config | _dtype_keys(dtype))


def _copy_model_files(source: epath.Path, directory: epath.Path, dtype: str) -> None:
    """Copy what `write_model_files` has written, and state another dtype."""
    for file in source.iterdir():
        file.copy(directory / file.name)
    config = read_json(source / "config.json")
    write_json(directory / "config.json", config | _dtype_keys(dtype))


def _dtype_keys(dtype: str) -> dict[str, str]:
    """Both spellings: transformers 5 reads the first, transformers 4 and vLLM the second."""
    return {"dtype": dtype, "torch_dtype": dtype}


def _generation(
    source: str | os.PathLike[str] | None, stop_ids: Sequence[int], pad_id: int
) -> dict[str, Any]:
    """Content of generation_config.json: the source's, where each stop id ends a completion too.

    In: {"eos_token_id": [5, 7], "top_p": 0.8}, (5,).  Out: the same.
    In: {"eos_token_id": 7}, (5,).  Out: {"eos_token_id": [5, 7]}.
    """
    file = None if source is None else epath.Path(source) / "generation_config.json"
    defaults = read_json(file) if file is not None and file.exists() else {}
    stored = defaults.get("eos_token_id")  # none, an id or a list
    stored_ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    eos_ids = [*(id for id in stop_ids if id not in stored_ids), *stored_ids]
    eos = eos_ids if len(eos_ids) > 1 else eos_ids[0]
    return {"pad_token_id": pad_id} | defaults | {"eos_token_id": eos}


def _peft_config(config: AdaptedModelConfig, base_path: str) -> dict[str, Any]:
    """Content of PEFT's adapter_config.json, for adapters beside the model in `base_path`."""
    table = families.parameters(config)
    adapters = [parameter.hf_name for parameter in table if parameter.is_adapter]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        # In: "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight".  Out: q_proj.
        "target_modules": sorted({name.split(".")[-3] for name in adapters}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
