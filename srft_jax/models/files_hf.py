"""What a Hugging Face directory holds beside its weights.

A run keeps these files of the model that it started from, so that each of its checkpoints can be
exported later, wherever that model is then.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from srft_jax.config import AdaptedModelConfig, ModelConfig
from srft_jax.models import families
from srft_jax.models.config_hf import to_hf_config
from srft_jax.models.json_files import read_json, write_json

if TYPE_CHECKING:  # its import costs a second that training from random weights need not pay
    from srft_jax.models.tokenizer import Tokenizer


def write_model_files(
    path: str | os.PathLike[str],
    model_config: ModelConfig,
    tokenizer: "Tokenizer | None",
    *,
    dtype: str,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes config.json and, with a tokenizer, its files and generation_config.json.

    Args:
        path: Directory; made where there is none.
        model_config: Architecture.
        tokenizer: Its files are copied as they are.
        dtype: Of the weights, as config.json is to state it.
        source: Directory of the model that this one comes from, whose defaults of sampling stay.
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
    write_json(directory / "config.json", config | _stating(dtype))


def copy_model_files(source: epath.Path, directory: epath.Path, dtype: str) -> None:
    """What `write_model_files` has written, for weights of this dtype."""
    for file in source.iterdir():
        file.copy(directory / file.name)
    write_json(directory / "config.json", read_json(source / "config.json") | _stating(dtype))


def stated_dtype(directory: epath.Path) -> str:
    """Of the weights, as config.json states it."""
    return str(read_json(directory / "config.json")["dtype"])


def _stating(dtype: str) -> dict[str, str]:
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
    given = read_json(file) if file is not None and file.exists() else {}
    found = given.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    ends = [*(one for one in stop_ids if one not in ends), *ends]
    return {"pad_token_id": pad_id} | given | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def to_peft_config(config: AdaptedModelConfig, base_path: str) -> dict[str, Any]:
    """Content of PEFT's adapter_config.json, for adapters beside the model in `base_path`."""
    adapters = [row.hf_name for row in families.parameters(config) if row.is_adapter]
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
