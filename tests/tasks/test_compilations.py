"""What a run says of its compilations."""

import jax
import jax.numpy as jnp

from srft_jax.tasks.compilations import Compilations


def test_each_compilation_is_counted_once_and_named():
    def doubled(x):
        return 2 * x

    compiled, x = jax.jit(doubled), jnp.ones(3)
    with Compilations() as compilations:
        compiled(x)
        metrics, line = compilations.since_last()
        assert metrics["perf/compilations"] == 1
        assert metrics["time/compile"] > 0
        assert "doubled" in line
        compiled(x)
        assert compilations.since_last() == ({"perf/compilations": 0.0, "time/compile": 0}, "")
    jax.jit(lambda x: 3 * x)(x)
    assert compilations.since_last()[0]["perf/compilations"] == 0
