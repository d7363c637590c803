"""The configuration that a run directory was made with, beside the one at hand."""

import dataclasses
from typing import Any

from etils import epath

from srft_jax.config import LoraConfig, RunConfig, UsageError, parse

# What may differ when a run is continued, sections or keys; all else would make it another run.
MAY_CHANGE = (
    *("run_dir", "compilation_cache", "training.profile_steps", "training.memory_mib"),
    *("mesh", "evaluation", "generate", "inspect", "export", "report", "plan"),
)


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


def changes(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the key of each leaf in which two configurations differ -> both values.

    In: two of which only `training.num_steps` differs.  Out: {"training.num_steps": (3, 6)}.
    """
    old, new = (_leaves(dataclasses.asdict(config)) for config in (before, now))
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def check_same_run(config: RunConfig) -> None:
    """Refuse to continue a run under another configuration.

    Raises:
        UsageError: names the keys that differ.
    """
    stored = stored_config(config.run_dir)
    if stored is None:
        return
    changed = {
        key: values
        for key, values in changes(stored, config).items()
        if not _may_change(key, config)
    }
    if changed:
        raise UsageError(
            f"{config.run_dir} holds a run with another configuration: {_listed(changed)}; "
            "choose another run_dir, or delete this one"
        )


def _may_change(key: str, config: RunConfig) -> bool:
    if key == "training.num_steps":  # a cosine's length is the run's, so its past would differ
        training = config.training
        schedules = {training.optimizer.schedule, training.demonstration_optimizer.schedule}
        return schedules == {"constant"}
    return key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    """In: {"seed": (0, 1)}.  Out: "seed = 1 (was 0)"."""
    return ", ".join(f"{key} = {now} (was {before})" for key, (before, now) in changed.items())


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
            f"{run_dir} holds a run with other adapters: {_listed(changed)}; "
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
