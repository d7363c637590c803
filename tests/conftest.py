"""What tests of several rooms share: quick compilation, tiny runs and their compilation cache."""

import os
import signal
import subprocess
import sys

import jax
import pytest
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import ROOT, metrics_lines, run_in_process, tiny_arguments

from srft_jax.tasks import train

ROOMS_OF_RUNS = {"host", "setup", "experience", "planning", "tasks"}
CACHE_OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_compilation_cache_max_size": 2**30,  # only with a limit does JAX lock what it writes
}


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """A directory that all processes of a run of pytest share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache_dir(pytestconfig):
    """Kept from one run of pytest to the next, e.g. from the default tests to the slow ones."""
    return str(pytestconfig.cache.mkdir("compilations"))


def made_once(path, make):
    """Calls `make(path)` in the process that comes first; the others wait for it."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


@pytest.fixture(autouse=True, scope="module")
def compilation_cache_here(request, cache_dir):
    """In this process, for the rooms that start runs; the others compile as they always do."""
    if request.path.parent.name not in ROOMS_OF_RUNS:
        yield
        return
    options = CACHE_OPTIONS | {"jax_compilation_cache_dir": cache_dir}
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def start(cache_dir):
    """Starts `python run.py ARGUMENTS` in the background, stderr apart."""
    options = {name.upper(): str(value) for name, value in CACHE_OPTIONS.items()}
    environment = os.environ | options | {"JAX_COMPILATION_CACHE_DIR": cache_dir}

    def start(*arguments, **variables):
        return subprocess.Popen(
            [sys.executable, "-u", "run.py", *arguments],
            cwd=ROOT,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def command(start):
    """Runs `python run.py ARGUMENTS` to its end: exit code, stdout, stderr."""

    def run(*arguments, **variables):
        process = start(*arguments, **variables)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="session")
def trained(shared_dir, command):
    """Run directory of a finished tiny run, made by the command line; not to be changed."""

    def make(run_dir):
        code, out, err = command("train", *tiny_arguments(run_dir))
        assert (code, err) == (0, "")
        (run_dir / "stdout.txt").write_text(out)

    return made_once(shared_dir / "trained", make)


@pytest.fixture(scope="session")
def uninterrupted(shared_dir, cache_dir):
    """Run directory of the same run, made within a process of pytest in one go; likewise."""

    def make(run_dir):
        assert run_in_process(run_dir) == 0
        assert len(metrics_lines(run_dir)) == 9  # six steps, three evaluations

    return made_once(shared_dir / "uninterrupted", make)


@pytest.fixture
def interrupt_in(monkeypatch):
    """Makes SIGINT arrive in the middle of the given step."""
    collect = train.collect

    def install(step):
        def collect_and_interrupt(sampler, scorer, sources, plan, stage, this_step, *args):
            if this_step == step:
                signal.raise_signal(signal.SIGINT)
            return collect(sampler, scorer, sources, plan, stage, this_step, *args)

        monkeypatch.setattr(train, "collect", collect_and_interrupt)

    return install


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that spend most of their time on letting XLA make fast what runs a few times."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()  # which do not tell programs of the two kinds apart
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
