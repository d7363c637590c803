"""Options of JAX itself that a run sets: precision of matmuls, where compiled programs are kept."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache

# A program that compiles quicker is not kept: its file would cost as much to read.
_LEAST_SECONDS = 0.1


@contextlib.contextmanager
def jax_options(matmul_precision: str, compilation_cache: str, run_dir: str) -> Iterator[None]:
    """Set JAX's options inside the `with` statement; JAX has its own again afterwards.

    Args:
        matmul_precision: A name that JAX knows, such as "highest"; "default" changes nothing.
        compilation_cache: Directory of compiled programs; "none" keeps none; "auto" takes
            run_dir/compilations, unless JAX has been given a directory, e.g. by its environment
            variable.
        run_dir: The run's directory.
    """
    options = _precision_options(matmul_precision) | _cache_options(compilation_cache, run_dir)
    before = {name: jax.config.values[name] for name in options}
    _set(options)
    try:
        yield
    finally:
        _set(before)


def _set(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # JAX reads the cache's directory once, at its first compilation


def _precision_options(precision: str) -> dict[str, Any]:
    return {} if precision == "default" else {"jax_default_matmul_precision": precision}


def _cache_options(directory: str, run_dir: str) -> dict[str, Any]:
    if directory == "none":
        return {"jax_enable_compilation_cache": False}
    if directory == "auto":
        if jax.config.values["jax_compilation_cache_dir"] is not None:
            return {}
        directory = os.fspath(epath.Path(run_dir) / "compilations")
    return {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": _LEAST_SECONDS,
    }
