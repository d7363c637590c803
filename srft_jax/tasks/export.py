"""Verb `export`: a checkpoint of the run directory as a Hugging Face directory.

It needs the run directory alone, on any number of devices: neither the data nor the model that the
run started from, unless adapters are to be merged into that.
"""

import os
from pathlib import Path

import jax
from etils import epath

from srft_jax.config import AdaptedModelConfig, ModelConfig, RunConfig, UsageError
from srft_jax.mesh import flat_mesh
from srft_jax.models import lora
from srft_jax.models.decoder import Params
from srft_jax.models.hf_config import read_config
from srft_jax.models.hf_export import check_target, export_hf, save_peft, write_model_files
from srft_jax.models.safetensors_reader import stored_dtype
from srft_jax.models.tokenizer import Tokenizer
from srft_jax.setup.model_checks import check_export
from srft_jax.training.loading import load_checkpoint, load_frozen


def export(config: RunConfig) -> int:
    """Write the checkpoint of `export.step`."""
    check_export(config)
    check_target(_export_path(config))
    files = _model_files(config)
    if not files.is_dir():
        raise UsageError(f"{files} is not there, which a run makes when it starts; train first")
    mesh = flat_mesh()  # whatever the run's was
    architecture = lora.adapted(read_config(files), config.model.lora)
    params = load_checkpoint(config.run_dir, config.model, architecture, mesh, config.export.step)
    if config.export.lora == "merged":
        params = lora.whole(load_frozen(config.model, architecture, mesh, config.seed), params)
    print(f"model    {write_export(config, params)}")
    return 0


def write_export(config: RunConfig, params: Params) -> str:
    """Write parameters of the run where the configuration says; return where that is."""
    path, files, base = _export_path(config), _model_files(config), config.model.path
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
    check_target(_export_path(config))
    path = config.model.path
    if jax.process_index() == 0:
        write_model_files(
            _model_files(config),
            lora.base(model_config),
            tokenizer,
            dtype="float32" if path is None else stored_dtype(Path(path)),
            source=path,
        )


def _export_path(config: RunConfig) -> str:
    default = "hf" if config.export.lora == "merged" else "adapter"
    return config.export.path or os.fspath(epath.Path(config.run_dir) / default)


def _model_files(config: RunConfig) -> epath.Path:
    return epath.Path(config.run_dir) / "model"
