"""What libtpu is told, and that a user's own word stands."""

import os

from srft_jax.tasks import libtpu


def test_flags_are_set_where_the_user_has_set_none(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    libtpu.set_flags()
    assert "--xla_tpu_enable_async_collective_fusion=true" in os.environ["LIBTPU_INIT_ARGS"].split()
    for own in ("--xla_tpu_scoped_vmem_limit_kib=98304", ""):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
        libtpu.set_flags()
        assert os.environ["LIBTPU_INIT_ARGS"] == own
