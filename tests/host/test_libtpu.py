"""Flags of libtpu are set before jax is imported, and a user's own flags stay."""

import os
import subprocess
import sys

from tiny_runs import ROOT

from srft_jax.host import libtpu


def test_flags_are_set_where_the_user_has_set_none(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")  # so that monkeypatch restores it
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    libtpu.set_flags()
    assert "--xla_tpu_enable_async_collective_fusion=true" in os.environ["LIBTPU_INIT_ARGS"].split()
    for flags in ("--xla_tpu_scoped_vmem_limit_kib=98304", ""):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
        libtpu.set_flags()
        assert os.environ["LIBTPU_INIT_ARGS"] == flags


def test_a_run_sets_them_before_jax_is_there(tmp_path):
    """On a machine with TPUs jax sets the variable itself, or adds a flag to it."""
    (tmp_path / "libtpu.so").touch()
    tpu_machine = {"JAX_FORCE_TPU_INIT": "1", "TPU_LIBRARY_PATH": str(tmp_path / "libtpu.so")}
    others = {name: value for name, value in os.environ.items() if name != "LIBTPU_INIT_ARGS"}
    code = "import os, run; run.main(['plan']); print(os.environ['LIBTPU_INIT_ARGS'])"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=others | tpu_machine | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--xla_enable_async_all_gather=true" in finished.stdout.split()
    assert "xla_tpu_use_enhanced_launch_barrier" in finished.stdout  # jax's own
