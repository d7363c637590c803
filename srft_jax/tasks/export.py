"""Verb `export`: a checkpoint of the run directory as a Hugging Face directory.

It needs the run directory alone: neither the data nor the model that the run started from, and any
number of devices.
"""

import os
from pathlib import Path

import jax
from etils import epath

from srft_jax.config import MeshConfig, RunConfig, UsageError
from srft_jax.mesh import make_mesh
from srft_jax.models.config_hf import read_config
from srft_jax.models.decoder import Params
from srft_jax.models.export_hf import check_target, export_hf
from srft_jax.models.files_hf import write_model_files
from srft_jax.models.tensor_files import stored_dtype
from srft_jax.tasks.setup import Setup
from srft_jax.tasks.states import abstract_params, restored_params


def export(config: RunConfig) -> int:
    """Writes the checkpoint of `export.step`."""
    check_target(_export_path(config))
    files = _model_files(config)
    if not files.is_dir():
        raise UsageError(f"{files} is not there, which a run makes when it starts; train first")
    mesh = make_mesh(MeshConfig(data=1, fsdp=jax.device_count()))  # whatever the run's mesh was
    like = abstract_params(mesh, read_config(files))
    path = write_export(config, restored_params(config, like, config.export.step))
    print(f"model    {path}")
    return 0


def write_export(config: RunConfig, params: Params) -> str:
    """Writes parameters of the run where the configuration says; returns where that is."""
    path = _export_path(config)
    export_hf(path, _model_files(config), params, dtype=config.export.dtype)
    return path


def keep_model_files(setup: Setup) -> None:
    """Puts into the run directory what an export of this run will need beside the parameters.

    Raises:
        UsageError: the export at the end of training would overwrite what is not a model.
    """
    check_target(_export_path(setup.config))
    path = setup.config.model.path
    if jax.process_index() == 0:
        write_model_files(
            _model_files(setup.config),
            setup.model_config,
            setup.tokenizer,
            dtype="float32" if path is None else stored_dtype(Path(path)),
            source=path,
        )


def _export_path(config: RunConfig) -> str:
    return config.export.path or os.fspath(epath.Path(config.run_dir) / "hf")


def _model_files(config: RunConfig) -> epath.Path:
    return epath.Path(config.run_dir) / "model"
