"""What tests of several rooms share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that spend most of their time on letting XLA make fast what runs a few times."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()  # which do not tell programs of the two kinds apart
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
