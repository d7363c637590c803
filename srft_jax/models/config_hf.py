"""config.json of a Hugging Face model <-> ModelConfig.

What a model has and we do not compute is an error: a rope scaling that is ignored costs a run.
"""

import json
from pathlib import Path
from typing import Any

from srft_jax.config import ModelConfig, UsageError

_ARCHITECTURE, _MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"

# Field of ModelConfig -> key of config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
    "init_std": "initializer_range",
}

# What transformers assumes of a key that config.json leaves out; the other keys must be there.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
}
_DEFAULT_ROPE_THETA = 10_000.0

# Features we do not compute, at the only value we accept.
_NEUTRAL = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "rope_scaling": None,
    "quantization_config": None,
}


def read_config(directory: Path) -> ModelConfig:
    """Architecture of the model in `directory`; UsageError on one that we would compute wrongly."""
    file = directory / "config.json"
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory; a Hugging Face model is one")
    if not file.is_file():
        raise UsageError(f"{directory} holds no config.json, so it is not a Hugging Face model")
    raw = read_json(file)
    _check_config(raw, file)
    heads = raw["num_attention_heads"]
    filled = _DEFAULTS | {"head_dim": raw["hidden_size"] // heads} | raw
    # transformers writes null for "as many as there are query heads".
    filled["num_key_value_heads"] = filled["num_key_value_heads"] or heads
    fields = {field: filled[key] for field, key in _FIELDS.items()}
    return ModelConfig(**fields, rope_theta=_rope_theta(raw, file))


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is not JSON: {error}") from error


def _check_config(raw: dict[str, Any], file: Path) -> None:
    """Raises on a model of another family, or with features that we would leave out."""
    named = raw.get("architectures") or [_ARCHITECTURE]
    if raw.get("model_type") != _MODEL_TYPE or named != [_ARCHITECTURE]:
        raise UsageError(
            f"{file} is of architectures {named} and model_type {raw.get('model_type')!r}; only "
            f"{_ARCHITECTURE} ({_MODEL_TYPE}) is supported"
        )
    for key in _FIELDS.values():
        if key not in raw and key not in _DEFAULTS and key != "head_dim":
            raise UsageError(f"{file} lacks {key}")
    for key, neutral in _NEUTRAL.items():
        if raw.get(key, neutral) != neutral:
            raise UsageError(f"{file} has {key} = {raw[key]!r}; only {neutral!r} is supported")
    if kinds := set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise UsageError(
            f"{file} has layer_types {sorted(kinds)}; only 'full_attention' is supported"
        )


def _rope_theta(raw: dict[str, Any], file: Path) -> float:
    """transformers 5 writes it under `rope_parameters`, earlier versions at top level."""
    rope = raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UsageError(
            f"{file} has rope_parameters.rope_type = {kind!r}; only 'default' is supported"
        )
    given = {float(source["rope_theta"]) for source in (raw, rope) if "rope_theta" in source}
    if len(given) > 1:
        raise UsageError(
            f"{file} has rope_theta = {raw['rope_theta']} and, under rope_parameters, "
            f"rope_theta = {rope['rope_theta']}"
        )
    return given.pop() if given else _DEFAULT_ROPE_THETA


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json, without the weights' dtype and the ids of special tokens."""
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": _MODEL_TYPE,
        **{key: getattr(config, field) for field, key in _FIELDS.items()},
        # Both spellings: transformers 5 reads the nested one, transformers 4 and vLLM the other.
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        **{key: value for key, value in _NEUTRAL.items() if value is not None},
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
