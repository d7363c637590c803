"""The configuration that a run directory was made with, beside the one at hand."""

import dataclasses
from typing import Any

from etils import epath

from srft_jax.config import LoraConfig, RunConfig, UsageError, parse


def stored_config(run_dir: str) -> RunConfig | None:
    """Read the configuration that a run directory holds; None where no run has started.

    Raises:
        UsageError: it has keys that there are no longer.
    """
    file = epath.Path(run_dir) / "config.yaml"
    if not file.exists():
        return None
    try:
        return parse(["--config", str(file)])[1]
    except UsageError as error:
        raise UsageError(f"{file}, of the run that is there, cannot be read: {error}") from None


def changes(before: Any, now: Any) -> dict[str, str]:
    """Return the key of each leaf in which two sections differ -> both values.

    In: two of which only `training.num_steps` differs.
    Out: {"training.num_steps": "training.num_steps = 6 (was 3)"}.
    """
    old, new = (_leaves(dataclasses.asdict(section)) for section in (before, now))
    return {
        key: f"{key} = {new.get(key)} (was {old.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def check_same_adapters(run_dir: str, lora: LoraConfig | None) -> None:
    """Refuse to read a run's parameters under another section `model.lora`: with another alpha or
    without a target they would make another model.

    Raises:
        UsageError: names the keys that differ.
    """
    stored = stored_config(run_dir)
    if stored is None:
        return
    asked = dataclasses.replace(stored, model=dataclasses.replace(stored.model, lora=lora))
    changed = changes(stored, asked)
    if changed:
        raise UsageError(
            f"{run_dir} holds a run with other adapters: {', '.join(changed.values())}; "
            f"start from --config={run_dir}/config.yaml"
        )


def _leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """In: {"a": {"b": 1}}.  Out: {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
