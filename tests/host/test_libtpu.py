"""What libtpu is told, and that a user's own word stands."""

import os
import subprocess
import sys

from tiny_runs import ROOT

from srft_jax.host import libtpu


def test_flags_are_set_where_the_user_has_set_none(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")  # so that what it was before is set again
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    libtpu.set_flags()
    assert "--xla_tpu_enable_async_collective_fusion=true" in os.environ["LIBTPU_INIT_ARGS"].split()
    for own in ("--xla_tpu_scoped_vmem_limit_kib=98304", ""):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
        libtpu.set_flags()
        assert os.environ["LIBTPU_INIT_ARGS"] == own


def test_a_run_sets_them_before_jax_is_there(tmp_path):
    """Which on a machine with TPUs sets the variable itself, unless there is one to add to."""
    (tmp_path / "libtpu.so").touch()
    of_machine = {"JAX_FORCE_TPU_INIT": "1", "TPU_LIBRARY_PATH": str(tmp_path / "libtpu.so")}
    without = {name: value for name, value in os.environ.items() if name != "LIBTPU_INIT_ARGS"}
    code = "import os, run; run.main(['plan']); print(os.environ['LIBTPU_INIT_ARGS'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=without | of_machine | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--xla_enable_async_all_gather=true" in done.stdout.split()
    assert "xla_tpu_use_enhanced_launch_barrier" in done.stdout  # jax's own
