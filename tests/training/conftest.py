"""What the tests of the train step share."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """XLA spends most of these tests on making fast what runs once or twice."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()  # which do not tell programs of the two kinds apart
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
