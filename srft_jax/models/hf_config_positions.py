"""Rotary positions and sliding windows: keys of a config.json <-> fields of ModelConfig.

transformers 5 writes rotary parameters under `rope_parameters`, earlier versions at top level. Both
spellings are read, where they must agree, and both are written.
"""

from pathlib import Path
from typing import Any, get_type_hints

from srft_jax.config import ModelConfig, RopeScaling, UsageError
from srft_jax.models.hf_config_keys import Spelling
from srft_jax.models.hf_json import check_types

KEYS = frozenset(("rope_theta", "rope_scaling", "rope_parameters"))
LOCAL_KEYS = frozenset(("rope_local_base_freq",))
WINDOW_KEYS = {
    "none": frozenset[str](),
    "all": frozenset(("sliding_window",)),
    "layer_types": frozenset(
        ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern")
    ),
    "max_window_layers": frozenset(("sliding_window", "layer_types", "max_window_layers")),
}

# Types of the values of these keys.
TYPES = {
    "rope_theta": float,
    "rope_local_base_freq": float,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "sliding_window": int,
    "sliding_window_pattern": int,
    "_sliding_window_pattern": int,
    "max_window_layers": int,
    "layer_types": list,
    "use_sliding_window": bool,
}

_THETA, _LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 10_000.0, 1_000_000.0  # transformers' defaults

# For each kind of scaling: field of RopeScaling -> key, first required ones and then optional ones.
_ORIGINAL = {"original_max_positions": "original_max_position_embeddings"}
_LLAMA3 = {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
_REQUIRED = {
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor"} | _LLAMA3,
    "yarn": {"factor": "factor"},
}
_OPTIONAL = {"linear": {}, "llama3": _ORIGINAL, "yarn": _ORIGINAL | {name: name for name in _YARN}}


def read_rope(
    raw: dict[str, Any], spelling: Spelling, max_positions: int, file: Path
) -> dict[str, Any]:
    """Read the fields rope_theta and rope_scaling, and rope_local_theta if the family has one.

    In: {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}.
    Out: rope_theta 5e5, rope_scaling RopeScaling("linear", 2.0).
    """
    scaling = raw.get("rope_scaling") or {}
    nested = raw.get("rope_parameters") or {}
    # One rope for all layers: `rope_parameters` is its object, as `rope_scaling` is.
    if not spelling.has_local_rope:
        theta = _agreed("rope_theta", (raw, nested, scaling), _THETA, file)
        return {"rope_theta": theta, "rope_scaling": _scaling(scaling, nested, max_positions, file)}
    # Two ropes: `rope_parameters` holds an object for each kind of layer, and the top level has
    # `rope_theta` and `rope_scaling` for full attention, `rope_local_base_freq` for sliding.
    if unknown := nested.keys() - {"full_attention", "sliding_attention"}:
        raise UsageError(
            f"{file} has rope_parameters with {', '.join(sorted(unknown))}; {spelling.model_type} "
            "has some for full_attention and some for sliding_attention"
        )
    check_types(nested, dict.fromkeys(nested, dict), f"{file}: rope_parameters")
    full, local = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    if (kind := _kind(local)) != "default":
        raise UsageError(
            f"{file} has rope_parameters.sliding_attention.rope_type = {kind!r}; only 'default' is "
            "supported there"
        )
    local_sources = ({"rope_theta": raw.get("rope_local_base_freq")}, local)
    return {
        "rope_theta": _agreed("rope_theta", (raw, full, scaling), _GLOBAL_THETA, file),
        "rope_scaling": _scaling(scaling, full, max_positions, file),
        "rope_local_theta": _agreed("rope_theta", local_sources, _LOCAL_THETA, file),
    }


def _agreed(key: str, sources: tuple[dict[str, Any], ...], default: float, file: Path) -> float:
    """The value that all sources which have this key give it."""
    for source in sources:
        check_types(source, {key: float}, str(file))
    values = {float(source[key]) for source in sources if source.get(key) is not None}
    if len(values) > 1:
        raise UsageError(f"{file} has {key} = {' and '.join(str(x) for x in sorted(values))}")
    return values.pop() if values else default


def _kind(rope: dict[str, Any]) -> str:
    """The kind of scaling; older files write "type"."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def _scaling(
    old: dict[str, Any], new: dict[str, Any], max_positions: int, file: Path
) -> RopeScaling | None:
    """The scaling in `rope_scaling` and in `rope_parameters`, which must agree if both exist."""
    scalings = [_read_scaling(rope, max_positions, file) for rope in (old, new) if rope]
    if len(set(scalings)) > 1:
        raise UsageError(f"{file} has rope_scaling = {old} and rope_parameters = {new}")
    return scalings[0] if scalings else None


def _read_scaling(rope: dict[str, Any], max_positions: int, file: Path) -> RopeScaling | None:
    kind = _kind(rope)
    if kind != "default" and kind not in _REQUIRED:
        raise UsageError(
            f"{file} has a rope scaling of rope_type = {kind!r}; only default, "
            f"{', '.join(_REQUIRED)} are supported"
        )
    keys = _REQUIRED.get(kind, {}) | _OPTIONAL.get(kind, {})
    _check_rope_keys(rope, kind, set(keys.values()), file)
    types = get_type_hints(RopeScaling)
    check_types(rope, {key: types[field] for field, key in keys.items()}, f"{file}: rope scaling")
    if kind == "default":
        return None
    # A key that is left out: llama3 and yarn start from the model's own max_positions, and yarn
    # stretches the original length to it.
    filled = {"original_max_position_embeddings": max_positions} | {
        key: value for key, value in rope.items() if value is not None
    }
    if kind == "yarn" and "factor" not in filled:
        filled["factor"] = max_positions / filled["original_max_position_embeddings"]
    if lacking := [key for key in _REQUIRED[kind].values() if key not in filled]:
        raise UsageError(f"{file} has a rope scaling of {kind} that lacks {', '.join(lacking)}")
    fields: dict[str, Any] = {f: filled[key] for f, key in keys.items() if key in filled}
    fields["kind"] = kind
    return RopeScaling(**fields)


def _check_rope_keys(rope: dict[str, Any], kind: str, known: set[str], file: Path) -> None:
    """Raise on a key that this kind of scaling does not have; null counts as left out."""
    known = known | {"rope_type", "type", "rope_theta"}
    if rope.get("partial_rotary_factor") == 1.0:  # the whole head is rotated, as always here
        known.add("partial_rotary_factor")
    unknown = {key: value for key, value in rope.items() if key not in known and value is not None}
    if unknown:
        listed = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
        raise UsageError(f"{file} has a rope scaling of rope_type {kind!r} with unknown {listed}")


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `read_rope` reads, in both spellings."""
    scaling = config.rope_scaling
    scaled = {"rope_type": "default"} if scaling is None else _scaling_keys(scaling)
    full = {"rope_theta": config.rope_theta, **scaled}
    written: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": full}
    if config.rope_local_theta is not None:
        local = {"rope_theta": config.rope_local_theta, "rope_type": "default"}
        written["rope_local_base_freq"] = config.rope_local_theta
        written["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return written if scaling is None else written | {"rope_scaling": scaled}


def _scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
    keys = _REQUIRED[scaling.kind] | _OPTIONAL[scaling.kind]
    values = {key: getattr(scaling, field) for field, key in keys.items()}
    return {"rope_type": scaling.kind, **{k: v for k, v in values.items() if v is not None}}


def read_window(raw: dict[str, Any], spelling: Spelling, file: Path) -> dict[str, Any]:
    """Read the fields sliding_window and full_attention_layers."""
    window = raw.get("sliding_window", spelling.window_default)
    # A qwen2 config.json states a window even where `use_sliding_window` switches it off.
    if spelling.windows == "none" or (spelling.gated_window and not raw.get("use_sliding_window")):
        window = None
    types = raw.get("layer_types") or _default_types(raw, spelling, window)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise UsageError(f"{file} has layer_types {sorted(unknown)}, which are not supported")
    if len(types) != raw["num_hidden_layers"]:
        raise UsageError(
            f"{file} has {len(types)} layer_types for {raw['num_hidden_layers']} layers"
        )
    if window is None and "sliding_attention" in types:
        raise UsageError(f"{file} has layers of sliding_attention but no sliding window")
    full = tuple(number for number, kind in enumerate(types) if kind == "full_attention")
    # A window that no layer uses is none.
    if window is None or len(full) == len(types):
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def _default_types(raw: dict[str, Any], spelling: Spelling, window: int | None) -> list[str]:
    """The layer_types that transformers derives from older keys.

    In: gemma3's sliding_window_pattern 3 and 4 layers.  Out: sliding, sliding, full, sliding.
    """

    def slides(layer: int) -> bool:
        if spelling.windows == "layer_types":
            pattern = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern")) or 6
            return bool((layer + 1) % pattern)  # each pattern-th layer sees everything
        # Layers from `max_window_layers` on slide, by default from the 29th on.
        first = 0 if spelling.windows == "all" else raw.get("max_window_layers", 28)
        return window is not None and layer >= first

    layers = range(raw["num_hidden_layers"])
    return ["sliding_attention" if slides(layer) else "full_attention" for layer in layers]


def write_window(config: ModelConfig, spelling: Spelling) -> dict[str, Any]:
    """Return the keys that `read_window` reads."""
    slides, kind = config.slides, spelling.windows
    written: dict[str, Any] = {}
    if spelling.gated_window:
        written["use_sliding_window"] = any(slides)
    if kind == "all" or (kind != "none" and any(slides)):
        written["sliding_window"] = config.sliding_window
    if kind == "layer_types" or (kind == "max_window_layers" and any(slides)):
        names = ("full_attention", "sliding_attention")
        written["layer_types"] = [names[layer_slides] for layer_slides in slides]
    if kind == "max_window_layers" and any(slides):
        written["max_window_layers"] = slides.count(False)
    if kind == "layer_types":  # older versions know only layers at regular distances
        pattern = slides.index(False) + 1 if False in slides else config.num_layers + 1
        if slides == tuple(bool((n + 1) % pattern) for n in range(config.num_layers)):
            written["sliding_window_pattern"] = pattern
    return written
