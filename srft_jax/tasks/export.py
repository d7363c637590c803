"""Verb `export`: the newest checkpoint of the run directory as a Hugging Face directory."""

from etils import epath

from srft_jax.config import AdaptedModelConfig, RunConfig
from srft_jax.models.checkpoint_hf import save_hf
from srft_jax.models.checkpoint_peft import save_peft
from srft_jax.models.decoder import Params
from srft_jax.tasks.setup import Setup, prepare
from srft_jax.tasks.states import trained_params


def export(config: RunConfig) -> int:
    """Writes run_dir/hf."""
    setup = prepare(config)
    print(f"model    {write_model(setup, trained_params(setup))}")
    return 0


def write_model(setup: Setup, params: Params) -> epath.Path:
    """Writes the policy where the configuration says, whole or its adapters alone."""
    path, model = epath.Path(setup.config.run_dir) / "hf", setup.model_config
    base = setup.config.model.path
    if setup.config.export.lora == "adapter":
        assert isinstance(model, AdaptedModelConfig) and base is not None  # `prepare` has checked
        save_peft(path, model, params, base)
    else:
        save_hf(path, model, params, setup.tokenizer)
    return path
