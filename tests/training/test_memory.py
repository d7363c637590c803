"""What a step holds: nothing twice, and of activations what the policy says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import MODEL, OBJECTIVES, OPTIONS, SHAPE, split, state_of

from srft_jax.config import OptimizerConfig
from srft_jax.models import forward, init_params
from srft_jax.models.decoder import Runtime
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"name": "adafactor"}, marks=pytest.mark.slow),
        pytest.param({"name": "muon", "state_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_the_state_is_there_once(settings):
    """Each array of the new state lies where the old one did: none is an output of its own."""
    optimizer = make_optimizer(OptimizerConfig(**settings), MODEL, num_updates=2)
    step = make_train_step(OPTIONS, OBJECTIVES["srft"], optimizer)
    state, batch = state_of(optimizer), dataclasses.replace(split("srft"), on_policy=True)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(state)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024  # metrics
    assert memory.argument_size_in_bytes <= num_bytes(state) + num_bytes(batch)
    header = compiled.as_text().partition("\n")[0]
    assert header.count("-alias)") == len(jax.tree.leaves(state))


def total(remat):
    """A sum of random outputs, as a function of the parameters."""
    random = np.random.default_rng(0)
    shape = SHAPE[1], 16
    tokens = jnp.asarray(random.integers(0, MODEL.vocab_size, shape), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    weights = random.normal(size=(*shape, MODEL.dim)).astype(np.float32)

    def total(params):
        hidden = forward(
            params, MODEL, tokens, positions, positions * 0 + 1, runtime=Runtime(remat=remat)
        ).hidden
        return (hidden * weights).sum()

    return total


@pytest.mark.slow
def test_offloaded_activations_give_the_gradient_of_kept_ones():
    params = init_params(MODEL, jax.random.key(0))
    programs = {
        remat: str(jax.make_jaxpr(jax.grad(total(remat)))(params))
        for remat in ("none", "dots", "offload")
    }
    # Six results of matmuls and the block's input go to the host, and nothing of the others.
    count = {name: text.count("devices=(MemorySpace.Host,)") for name, text in programs.items()}
    assert count == {"none": 0, "dots": 0, "offload": 7}
    with jax.default_matmul_precision("highest"):
        kept, offloaded = (jax.jit(jax.grad(total(remat)))(params) for remat in ("none", "offload"))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(kept), jax.tree.leaves(offloaded), strict=True
    ):
        assert np.abs(a).max() > 1e-3, path
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(np.abs(a).max()))
