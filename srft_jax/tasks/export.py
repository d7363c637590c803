"""Verb `export`: a checkpoint of the run directory as a Hugging Face directory.

It needs the run directory alone, on any number of devices: neither the data nor the model that the
run started from, unless adapters are to be merged into that.
"""

from srft_jax.config import RunConfig, UsageError
from srft_jax.mesh import flat_mesh
from srft_jax.models import lora
from srft_jax.models.hf_config import read_config
from srft_jax.models.hf_export import check_target
from srft_jax.setup.model_checks import check_export
from srft_jax.training.loading import load_checkpoint, load_frozen
from srft_jax.training.run_export import export_path, model_files, write_export


def export(config: RunConfig) -> int:
    """Write the checkpoint of `export.step`."""
    check_export(config)
    check_target(export_path(config))
    files = model_files(config)
    if not files.is_dir():
        raise UsageError(f"{files} is not there, which a run makes when it starts; train first")
    mesh = flat_mesh()  # whatever the run's was
    architecture = lora.adapted(read_config(files), config.model.lora)
    params = load_checkpoint(config.run_dir, config.model, architecture, mesh, config.export.step)
    if config.export.lora == "merged":
        params = lora.whole(load_frozen(config.model, architecture, mesh, config.seed), params)
    print(f"model    {write_export(config, params)}")
    return 0
