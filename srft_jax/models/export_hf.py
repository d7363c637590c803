"""Hugging Face directories out, local or on an object store (gs://).

Everything is written to a sibling directory first and renamed at the end: a killed export leaves
what was there.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import flax.traverse_util
import jax
from etils import epath
from jax.experimental import multihost_utils

from srft_jax.config import AdaptedModelConfig, LoraConfig, ModelConfig, UsageError
from srft_jax.config.paths import absolute
from srft_jax.models import families, lora
from srft_jax.models.config_hf import read_config
from srft_jax.models.decoder import Params
from srft_jax.models.files_hf import (
    copy_model_files,
    stated_dtype,
    to_peft_config,
    write_model_files,
)
from srft_jax.models.json_files import write_json
from srft_jax.models.tensor_parts import write_adapters, write_tensors

if TYPE_CHECKING:  # its import costs a second that training from random weights need not pay
    from srft_jax.models.tokenizer import Tokenizer


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
        write_tensors(directory, model_config, params, dtype)


def export_hf(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    params: Params,
    *,
    lora_config: LoraConfig | None = None,
    dtype: str | None = None,
) -> None:
    """`save_hf` with all but the weights from `source`, where `write_model_files` left it.

    Args:
        path: Directory to make; an earlier model there is replaced.
        source: Directory with config.json and what else an export has beside its weights.
        params: Of the architecture in config.json.
        lora_config: Of the adapters among the parameters, which are merged.
        dtype: Of the tensors written; None is what config.json says.

    Raises:
        UsageError, ValueError: as `save_hf`.
    """
    files = epath.Path(source)
    model_config = lora.adapted(read_config(files), lora_config)
    dtype = dtype or stated_dtype(files)
    _check_params(model_config, params)
    with _replaced_directory(path) as directory:
        if jax.process_index() == 0:
            copy_model_files(files, directory, dtype)
        write_tensors(directory, model_config, params, dtype)


def save_peft(
    path: str | os.PathLike[str],
    config: AdaptedModelConfig,
    params: Params,
    base_path: str,
    *,
    dtype: str = "float32",
) -> None:
    """Writes adapters alone, as a directory that `peft.PeftModel.from_pretrained` puts onto the
    base model.

    All processes call this with their shards of the parameters; process 0 writes.

    Args:
        path: Directory to make; an earlier export there is replaced.
        config: Architecture with its adapters.
        params: Those of adapters at least.
        base_path: Hugging Face directory of the model that the adapters belong to.
        dtype: Of the tensors written.

    Raises:
        UsageError: `path` holds something that is not an export.
    """
    with _replaced_directory(path) as directory:
        write_adapters(directory / "adapter_model.safetensors", config, params, dtype)
        if jax.process_index() == 0:
            write_json(directory / "adapter_config.json", to_peft_config(config, base_path))


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


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises UsageError where an export to `path` would overwrite what is not a model."""
    target = epath.Path(path)
    empty = target.is_dir() and not any(target.iterdir())
    known = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not known and not empty:
        raise UsageError(f"{path} exists and is not a Hugging Face model, so it is not overwritten")


@contextlib.contextmanager
def _replaced_directory(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A directory that process 0 makes, and that becomes `path` when the block ends well.

    What a killed export left behind is cleared by the next one, or put back in its place. Object
    stores rename file by file: there, the two renamings are what must not be killed.
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
    if jax.process_index() == 0:
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        if replaced.exists():
            replaced.rmtree()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {target.name}")
