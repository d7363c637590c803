"""Adapters alone, in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from srft_jax.config import AdaptedModelConfig
from srft_jax.models import families
from srft_jax.models.checkpoint_hf import hf_names, replaced_directory
from srft_jax.models.config_hf import write_json
from srft_jax.models.decoder import Params


def save_peft(
    path: str | os.PathLike[str], config: AdaptedModelConfig, params: Params, base_path: str
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` puts onto the base model.

    Args:
        path: Directory to make; an earlier export there is replaced.
        config: Architecture with its adapters.
        params: Those of adapters at least; only they are written, in float32.
        base_path: Hugging Face directory of the model that the adapters belong to.

    Raises:
        UsageError: `path` holds something that is not an export.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    rows = [row for row in families.parameters(config) if row.is_adapter]
    tensors: dict[str, np.ndarray] = {}
    for row in rows:
        # PEFT stores [r, in] and [out, r]; in its names the layer is part of the module.
        layers = np.asarray(flat[row.path], np.float32).swapaxes(1, 2)
        tensors |= dict(zip(hf_names(row, config), map(np.ascontiguousarray, layers), strict=True))
    with replaced_directory(Path(path)) as directory:
        file = directory / "adapter_model.safetensors"
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files for their owner alone
        write_json(directory / "adapter_config.json", _peft_config(config, rows, base_path))


def _peft_config(
    config: AdaptedModelConfig, rows: list[families.Parameter], base_path: str
) -> dict[str, Any]:
    """In: "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight".  Out: q_proj."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": sorted({row.hf_name.split(".")[-3] for row in rows}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
