"""config.json of a Hugging Face model <-> ModelConfig.

A feature that a model has and we do not compute is an error: ignoring a rope scaling costs a run.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

from srft_jax.config import ModelConfig, RopeScaling, UsageError
from srft_jax.models import hf_config_positions as positions
from srft_jax.models.hf_config_keys import BOOKKEEPING, SPELLINGS, Spelling
from srft_jax.models.hf_json import check_types, read_json

_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Fields that hf_config_positions.py reads and writes.
_POSITION_FIELDS = {
    *("rope_theta", "rope_scaling", "rope_local_theta"),
    *("sliding_window", "full_attention_layers"),
}


def read_config(path: Path) -> ModelConfig:
    """Read a model's architecture; UsageError on one that we would compute wrongly.

    Args:
        path: Hugging Face directory, or the config.json in it.
    """
    directory = path.parent if path.name == "config.json" else path
    file = directory / "config.json"
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is not a directory (seen from {Path.cwd()}); models are read from "
            "local directories, names on the hub are not downloaded"
        )
    if not file.is_file():
        raise UsageError(f"{directory} holds no config.json, so it is not a Hugging Face model")
    raw = read_json(file)
    family = _named_family(raw, file)
    spelling = SPELLINGS[family]
    raw = {spelling.aliases.get(key, key): value for key, value in raw.items()}
    # Unknown keys first: a feature that we do not compute must not look like a wrong type.
    _check_keys(raw, spelling, file)
    _check_types(raw, spelling, file)
    fields = {"family": family} | _read_fields(raw, spelling, file)
    fields |= positions.read_rope(raw, spelling, fields["max_positions"], file)
    fields |= positions.read_window(raw, spelling, file)
    config = ModelConfig(**fields)
    check_architecture(config, str(file))
    return config


def _named_family(raw: dict[str, Any], file: Path) -> str:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    for family, spelling in SPELLINGS.items():
        # Some tools leave out the architectures; the model_type is enough then.
        fits = not architectures or architectures == [spelling.architecture]
        if model_type == spelling.model_type and fits:
            return family
    known = ", ".join(f"{s.architecture} ({s.model_type})" for s in SPELLINGS.values())
    hint = "; of gemma3 only the models of text alone" if model_type == "gemma3" else ""
    raise UsageError(
        f"{file} is of architectures {architectures} and model_type {model_type!r}; "
        f"supported are {known}{hint}"
    )


def _check_keys(raw: dict[str, Any], spelling: Spelling, file: Path) -> None:
    """Raise on an unknown key, or one that asks for a feature that we do not compute."""
    # Features that we do not compute, switched on.
    for key, neutral in spelling.neutral.items():
        if raw.get(key) is not None and raw[key] != neutral:
            raise UsageError(f"{file} has {key} = {raw[key]!r}; only {neutral!r} is supported")
    # All keys that this family may have; null means that a key is not used.
    known = BOOKKEEPING | positions.KEYS | positions.WINDOW_KEYS[spelling.windows]
    known |= {*spelling.fields.values(), *spelling.neutral, *spelling.ignored}
    known |= positions.LOCAL_KEYS if spelling.has_local_rope else set()
    known |= {"use_sliding_window"} if spelling.gated_window else set()
    unknown = [f"{key} = {raw[key]!r}" for key in raw if key not in known and raw[key] is not None]
    if unknown:
        raise UsageError(
            f"{file} has {', '.join(unknown)}, unknown for model_type {spelling.model_type!r}; "
            "take out what does not change the function that the model computes"
        )


def _check_types(raw: dict[str, Any], spelling: Spelling, file: Path) -> None:
    types = get_type_hints(ModelConfig)
    del types["activation"]  # `_read_fields` compares it with the words that it may be
    field_types = {key: types[field] for field, key in spelling.fields.items() if field in types}
    check_types(raw, field_types | positions.TYPES, str(file))


def _read_fields(raw: dict[str, Any], spelling: Spelling, file: Path) -> dict[str, Any]:
    """Fields that are one key each. A key that is left out or null has transformers' default."""
    present = {key: value for key, value in raw.items() if value is not None}
    # These have no default anywhere, and two more follow from them where they are left out.
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    if lacking := [key for key in sizes if key not in present]:
        raise UsageError(f"{file} lacks {', '.join(lacking)}")
    heads = raw["num_attention_heads"]
    derived = {"head_dim": raw["hidden_size"] // max(1, heads), "num_key_value_heads": heads}
    filled = derived | spelling.defaults | present
    if lacking := [key for key in spelling.fields.values() if key not in filled]:
        raise UsageError(f"{file} lacks {', '.join(lacking)}")
    key = spelling.fields["activation"]
    if filled[key] not in _ACTIVATIONS:
        raise UsageError(
            f"{file} has {key} = {filled[key]!r}; only {', '.join(_ACTIVATIONS)} are supported"
        )
    return {field: filled[key] for field, key in spelling.fields.items()}


def check_architecture(config: ModelConfig, where: str) -> None:
    """Raise UsageError if fields contradict each other, or if the family does not have one.

    Args:
        config: Architecture to check.
        where: The file or key that it comes from, as messages name it.
    """
    _check_sizes(config, where)
    spelling = SPELLINGS[config.family]
    # A field that no key of this family says must have its default.
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        in_family = field.name in {"family", *spelling.fields, *_POSITION_FIELDS}
        if not in_family and value != field.default:
            raise UsageError(f"{where} has {field.name} = {value}; {config.family} has none")
    if "num_experts" in spelling.fields:
        total, active = config.num_experts, config.experts_per_token
        if total is None or active is None or active > total:
            raise UsageError(f"{where} has experts_per_token = {active} of num_experts = {total}")
    _check_window(config, spelling, where)
    if (config.rope_local_theta is not None) != spelling.has_local_rope:
        verb = "needs one" if spelling.has_local_rope else "has none"
        raise UsageError(
            f"{where} has rope_local_theta = {config.rope_local_theta}; {config.family} {verb}"
        )
    if config.rope_scaling is not None:
        _check_scaling(config.rope_scaling, where)


def _check_sizes(config: ModelConfig, where: str) -> None:
    for name, size in vars(config).items():
        if type(size) is int and size < 1:  # a bool is an int, but not a size
            raise UsageError(f"{where} has {name} = {size}, which is below 1")
    for name in ("rope_theta", "rope_local_theta", "attention_softcap", "logit_softcap"):
        _check_positive(name, getattr(config, name), where)
    # Each kv head serves equally many query heads; rope rotates pairs of a head's numbers.
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise UsageError(
            f"{where} has num_heads = {config.num_heads}, num_kv_heads = {config.num_kv_heads}, "
            f"head_dim = {config.head_dim}; kv heads must divide heads, and head_dim must be even"
        )


def _check_scaling(scaling: RopeScaling, where: str) -> None:
    if scaling.kind != "linear" and scaling.original_max_positions is None:
        raise UsageError(
            f"{where} has a rope_scaling of kind {scaling.kind} that lacks original_max_positions"
        )
    for name, value in vars(scaling).items():
        if type(value) in (int, float) and not name.startswith("mscale"):  # mscale may be 0
            _check_positive(f"rope_scaling.{name}", value, where)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.kind == "llama3" and not low < high:
        raise UsageError(
            f"{where} has a rope_scaling with low_freq_factor = {low}, which is not below "
            f"high_freq_factor = {high}"
        )


def _check_positive(name: str, value: float | None, where: str) -> None:
    if value is not None and not 0 < value < math.inf:  # NaN too
        raise UsageError(f"{where} has {name} = {value}, which is not above 0 and finite")


def _check_window(config: ModelConfig, spelling: Spelling, where: str) -> None:
    window, full = config.sliding_window, config.full_attention_layers
    if window is not None and spelling.windows == "none":
        raise UsageError(f"{where} has sliding_window = {window}; {config.family} has none")
    if full and window is None:
        raise UsageError(f"{where} has full_attention_layers but no sliding_window")
    if full and spelling.windows == "all":
        raise UsageError(
            f"{where} has full_attention_layers = {list(full)}, but {config.family} has its window "
            "in all layers or in none"
        )
    if not set(full) <= set(range(config.num_layers)):
        raise UsageError(
            f"{where} has full_attention_layers = {list(full)} of {config.num_layers} layers"
        )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json but the weights' dtype and the ids of special tokens."""
    spelling = SPELLINGS[config.family]
    values = {key: getattr(config, field) for field, key in spelling.fields.items()}
    return {
        "architectures": [spelling.architecture],
        "model_type": spelling.model_type,
        # qwen3_moe's width of dense layers, which our models do not have.
        **{key: config.mlp_dim for key in spelling.ignored if key == "intermediate_size"},
        **{key: value for key, value in values.items() if value is not None},
        **positions.write_rope(config),
        **positions.write_window(config, spelling),
        **{key: value for key, value in spelling.neutral.items() if value is not None},
    }
