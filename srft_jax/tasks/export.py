"""Verb `export`: the newest checkpoint of the run directory as a Hugging Face directory."""

from etils import epath

from srft_jax.config import RunConfig
from srft_jax.models.checkpoint_hf import save_hf
from srft_jax.tasks.setup import prepare
from srft_jax.tasks.states import trained_params


def export(config: RunConfig) -> int:
    """Writes run_dir/hf."""
    setup = prepare(config)
    path = epath.Path(config.run_dir) / "hf"
    save_hf(path, setup.model_config, trained_params(setup), setup.tokenizer)
    print(f"model    {path}")
    return 0
