"""What a run says of its compilations, and what a second start need not compile again."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import tiny_arguments, tiny_config

from srft_jax.host.compilations import Compilations, Program, listed
from srft_jax.host.jax_options import jax_options


def test_each_compilation_is_counted_once_and_named():
    def doubled(x):
        return 2 * x

    compiled, x = jax.jit(doubled), jnp.ones(3)
    with Compilations() as compilations:
        compiled(x)
        metrics, programs = compilations.since_last()
        assert metrics["perf/compilations"] == 1
        assert metrics["time/compile"] > 0
        assert [one.name for one in programs] == ["doubled"]
        compiled(x)
        metrics, programs = compilations.since_last()
        assert (set(metrics.values()), programs) == ({0.0}, [])
    jax.jit(lambda x: 3 * x)(x)
    assert compilations.since_last()[0]["perf/compilations"] == 0


def test_quick_programs_share_a_line():
    assert listed(
        [
            Program("train_step", 12.34, 1, 1),
            Program("decode", 2.0, 3, 3, 2),
            Program("prefill", 1.0, 2, 2, 2),
            Program("sample", 0.5, 1),
            Program("add", 0.04, 7, 7),
            Program("clip", 0.03, 1, 1),
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
    """JAX as it starts: no directory."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def start(config):
    """What a process finds in the cache that the configuration names."""

    def cubed(x):
        return x**3

    jax.clear_caches()
    with jax_options(config), Compilations() as compilations:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(cubed).lower(jnp.ones(3)).compile()
        (program,) = [one for one in compilations.since_last()[1] if one.name == "cubed"]
    return program.lookups, program.hits


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
    """Here by the fixture of these tests, elsewhere by JAX_COMPILATION_CACHE_DIR."""
    with jax_options(tiny_config(tmp_path / "run")):
        assert jax.config.values["jax_compilation_cache_dir"] == cache_dir


@pytest.mark.parametrize("wanted", ["default", "highest"])
def test_the_precision_of_matmuls_is_in_the_program(wanted, tmp_path):
    config = tiny_config(tmp_path, f"--model.matmul_precision={wanted}")
    with jax_options(config):
        jaxpr = str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))
    assert ("precision=(Precision.HIGHEST" in jaxpr) == (wanted == "highest"), jaxpr
    jaxpr = str(jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2))))
    assert "HIGHEST" not in jaxpr


@pytest.mark.slow
def test_a_second_run_compiles_nothing_again(tmp_path, command):
    """Whatever the order of sets, which Python shuffles from process to process."""
    arguments = ["--training.num_steps=1", "--evaluation.every=0"]
    cache = str(tmp_path / "cache")
    variables = dict(JAX_COMPILATION_CACHE_DIR=cache, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    said = []
    for name in ("first", "second"):
        run = tiny_arguments(tmp_path / name, *arguments)
        code, out, err = command("train", *run, **variables)
        assert (code, err) == (0, "")
        said.append([line for line in out.splitlines() if line.startswith("compiled")])
    first, second = ("\n".join(lines) for lines in said)
    assert "train_step in" in first and "miss" in first and "miss" not in second
