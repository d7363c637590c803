"""A run's model as a Hugging Face directory, and what the run directory keeps to make one."""

import os
from pathlib import Path

import jax
from etils import epath

from srft_jax.config import AdaptedModelConfig, ModelConfig, RunConfig
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.models.hf_config import read_config
from srft_jax.models.hf_export import check_target, export_hf, save_peft, write_model_files
from srft_jax.models.safetensors_reader import stored_dtype
from srft_jax.models.tokenizer import Tokenizer


def write_export(config: RunConfig, params: Params) -> str:
    """Write parameters of the run where the configuration says; return where that is."""
    path, files, base = export_path(config), model_files(config), config.model.path
    if config.export.lora == "adapter":
        architecture = lora.adapted(read_config(files), config.model.lora)
        assert isinstance(architecture, AdaptedModelConfig) and base is not None  # `check_export`
        save_peft(path, architecture, params, base, dtype=config.export.dtype or "float32")
    else:
        export_hf(path, files, params, lora_config=config.model.lora, dtype=config.export.dtype)
    return path


def keep_model_files(config: RunConfig, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Put into the run directory what an export of this run will need beside the parameters.

    Raises:
        UsageError: the export at the end of training would overwrite what is not a model.
    """
    check_target(export_path(config))
    path = config.model.path
    if jax.process_index() == 0:
        write_model_files(
            model_files(config),
            lora.base(model_config),
            tokenizer,
            dtype="float32" if path is None else stored_dtype(Path(path)),
            source=path,
        )


def export_path(config: RunConfig) -> str:
    """Return the directory that an export makes."""
    default = "hf" if config.export.lora == "merged" else "adapter"
    return config.export.path or os.fspath(epath.Path(config.run_dir) / default)


def model_files(config: RunConfig) -> epath.Path:
    """Return the directory that `keep_model_files` writes."""
    return epath.Path(config.run_dir) / "model"
