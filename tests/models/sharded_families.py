"""Loss and gradient of two families on one device and on meshes; prints the largest differences.

A script of its own, since the number of devices cannot change once JAX has started.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import FAMILIES, random_params

from srft_jax.config import MeshConfig
from srft_jax.mesh import constrained, context_parts, make_mesh, sharding
from srft_jax.models import Runtime, families, forward, output_head
from srft_jax.ops.context import split_rows
from srft_jax.ops.layers import softcapped

MESHES = [(8, 1, 1, 1), (2, 2, 1, 2), (1, 4, 1, 2), (1, 1, 1, 4), (1, 2, 2, 2), (1, 1, 4, 1)]


def loss_and_gradient(params, config, rows):
    parts = context_parts()

    def loss(params):
        split = (constrained(split_rows(x, parts), ("rows", None)) for x in rows)
        hidden = forward(params, config, *split, runtime=Runtime(remat="dots"), parts=parts).hidden
        logits = softcapped(hidden @ output_head(params, config), config.logit_softcap)
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    return jax.jit(jax.value_and_grad(loss))(params)


def largest_difference(result, expected):
    """The largest difference, relative to the largest entry of each array."""
    differences = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()),
        result,
        expected,
    )
    return max(jax.tree.leaves(differences))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    rng = np.random.default_rng(0)
    rows = (rng.integers(0, 64, (8, 16)), np.tile(np.arange(16), (8, 1)), np.ones((8, 16), int))
    rows = tuple(jnp.asarray(x, jnp.int32) for x in rows)
    results = {}
    for name in ("gemma3", "qwen3_moe"):
        config = dataclasses.replace(FAMILIES[name], mlp_dim=16)
        # At full size the layers make rounding ten times as large as it was.
        params = jax.tree.map(lambda x: 0.5 * x, random_params(config))
        expected = loss_and_gradient(params, config, rows)
        for shape in MESHES:
            devices = jax.devices()[: math.prod(shape)]
            mesh = make_mesh(MeshConfig(*shape), devices)
            where = families.param_shardings(mesh, config)
            sharded_rows = jax.device_put(rows, sharding(mesh, ("batch", None), (8, 16)))
            with jax.set_mesh(mesh):
                sharded = loss_and_gradient(jax.device_put(params, where), config, sharded_rows)
            results[f"{name} {'x'.join(map(str, shape))}"] = largest_difference(sharded, expected)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
