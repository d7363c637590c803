"""Options of JAX itself that a run sets: precision of matmuls, where compiled programs are kept."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from srft_jax.config import RunConfig

# What compiles quicker than this is compiled again: its file would cost as much to read.
_LEAST_SECONDS = 0.1


@contextlib.contextmanager
def jax_options(config: RunConfig) -> Iterator[None]:
    """The options of the configuration while the block runs; JAX has its own again afterwards."""
    options = _precision(config) | _cache(config)
    before = {name: jax.config.values[name] for name in options}
    _set(options)
    try:
        yield
    finally:
        _set(before)


def _set(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks once at where it is


def _precision(config: RunConfig) -> dict[str, Any]:
    wanted = config.model.matmul_precision
    return {} if wanted == "default" else {"jax_default_matmul_precision": wanted}


def _cache(config: RunConfig) -> dict[str, Any]:
    """`auto` leaves a directory alone that JAX has been given, e.g. by its environment variable."""
    wanted = config.compilation_cache
    if wanted == "none":
        return {"jax_enable_compilation_cache": False}
    if wanted == "auto":
        if jax.config.values["jax_compilation_cache_dir"] is not None:
            return {}
        wanted = os.fspath(epath.Path(config.run_dir) / "compilations")
    return {
        "jax_compilation_cache_dir": wanted,
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
    }
