"""A run tells what it compiles, and a second start reads it from the cache."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import tiny_arguments, tiny_config

from srft_jax.host.compilations import Compilations, CompiledFunction, compilation_lines
from srft_jax.host.jax_options import jax_options


def test_each_compilation_is_counted_once_and_named():
    def doubled(x):
        return 2 * x

    compiled, x = jax.jit(doubled), jnp.ones(3)
    with Compilations() as compilations:
        compiled(x)
        metrics, functions = compilations.since_last()
        assert metrics["perf/compilations"] == 1
        assert metrics["time/compile"] > 0
        assert [function.name for function in functions] == ["doubled"]
        compiled(x)
        metrics, functions = compilations.since_last()
        assert (set(metrics.values()), functions) == ({0.0}, [])
    jax.jit(lambda x: 3 * x)(x)
    assert compilations.since_last()[0]["perf/compilations"] == 0


def test_quick_compilations_share_a_line():
    assert compilation_lines(
        [
            CompiledFunction("train_step", 12.34, 1, 1),
            CompiledFunction("decode", 2.0, 3, 3, 2),
            CompiledFunction("prefill", 1.0, 2, 2, 2),
            CompiledFunction("sample", 0.5, 1),
            CompiledFunction("add", 0.04, 7, 7),
            CompiledFunction("clip", 0.03, 1, 1),
        ]
    ) == [
        "compiled train_step in 12.3 s (cache: miss)",
        "compiled decode in 2.0 s (cache: 2 of 3 hit)",
        "compiled prefill in 1.0 s (cache: hit)",
        "compiled sample in 0.5 s (cache: off)",
        "compiled 8 small programs in 0.1 s",
    ]


@pytest.fixture
def without_cache():
    """JAX as it starts: without a directory for compiled programs."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def options_here(config):
    """JAX's options as `run.py` takes them from a configuration."""
    return jax_options(config.model.matmul_precision, config.compilation_cache, config.run_dir)


def start(config):
    """Return lookups and hits of a process that compiles one function under a configuration."""

    def cubed(x):
        return x**3

    jax.clear_caches()
    with options_here(config), Compilations() as compilations:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(cubed).lower(jnp.ones(3)).compile()
        functions = {function.name: function for function in compilations.since_last()[1]}
    return functions["cubed"].lookups, functions["cubed"].hits


@pytest.mark.parametrize("flag", ["auto", "{dir}/elsewhere"])
def test_a_second_start_reads_what_the_first_compiled(flag, tmp_path, without_cache):
    flag = flag.format(dir=tmp_path)
    config = tiny_config(tmp_path / "run", f"--compilation_cache={flag}")
    assert (start(config), start(config)) == ((1, 0), (1, 1))
    folder = tmp_path / ("run/compilations" if flag == "auto" else "elsewhere")
    assert any(folder.glob("jit_cubed*-cache"))
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_without_a_cache_nothing_is_looked_up(tmp_path, without_cache):
    config = tiny_config(tmp_path / "run", "--compilation_cache=none")
    assert (start(config), start(config)) == ((0, 0), (0, 0))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_jax_was_given_stays(tmp_path, cache_dir):
    """Given by the fixture of these tests here, by JAX_COMPILATION_CACHE_DIR elsewhere."""
    with options_here(tiny_config(tmp_path / "run")):
        assert jax.config.values["jax_compilation_cache_dir"] == cache_dir


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_the_precision_of_matmuls_is_in_the_program(precision, tmp_path):
    config = tiny_config(tmp_path, f"--model.matmul_precision={precision}")
    with options_here(config):
        jaxpr = str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))
    assert ("precision=(Precision.HIGHEST" in jaxpr) == (precision == "highest"), jaxpr
    jaxpr = str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))
    assert "HIGHEST" not in jaxpr


@pytest.mark.slow
def test_a_second_run_compiles_nothing_again(tmp_path, command):
    """Programs must not depend on the order of sets, which Python shuffles in each process."""
    arguments = ["--training.num_steps=1", "--evaluation.every=0"]
    cache = str(tmp_path / "cache")
    variables = dict(JAX_COMPILATION_CACHE_DIR=cache, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    outputs = []
    for name in ("first", "second"):
        run = tiny_arguments(tmp_path / name, *arguments)
        code, out, err = command("train", *run, **variables)
        assert (code, err) == (0, "")
        outputs.append([line for line in out.splitlines() if line.startswith("compiled")])
    first, second = ("\n".join(lines) for lines in outputs)
    assert "train_step in" in first and "miss" in first and "miss" not in second
