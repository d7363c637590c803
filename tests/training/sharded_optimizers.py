"""Two updates of each optimizer on one device and on eight, from the same gradients.

A script of its own, since the number of devices cannot change once JAX has started.
"""

import dataclasses
import json

import jax
import numpy as np
import optax
from jax.sharding import AxisType
from sharded_steps import largest_difference
from tiny_training import MODEL

from srft_jax.config import OptimizerConfig
from srft_jax.models import init_params
from srft_jax.training.optimizer import make_optimizer
from srft_jax.training.state import state_shardings

WIDE = dataclasses.replace(MODEL, vocab_size=160, dim=128, head_dim=32, num_kv_heads=4, mlp_dim=192)


def random_params(seed: int) -> object:
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_params(WIDE, key), jax.random.key(0))
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def two_updates(optimizer: optax.GradientTransformation, put: object) -> object:
    params, state = put(random_params(0), optimizer.init(random_params(0)))

    @jax.jit
    def update(params: object, state: object, gradient: object) -> tuple:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for seed in (1, 2):
        params, state = update(params, state, put(random_params(seed), state)[0])
    return jax.device_get((params, state))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    results = {}
    for name, dtype in [("adafactor", "float32"), ("muon", "float32"), ("adamw", "bfloat16")]:
        config = OptimizerConfig(name=name, state_dtype=dtype, learning_rate=0.1, warmup_steps=0)
        optimizer = make_optimizer(config, WIDE, num_updates=8)
        where = state_shardings(WIDE, {"policy": optimizer}, mesh)

        def put(params: object, state: object, where: object = where) -> tuple:
            return jax.device_put((params, state), (where.params, where.optimizer_states["policy"]))

        whole = two_updates(optimizer, lambda *trees: trees)
        results[name] = {
            "difference": largest_difference(two_updates(optimizer, put), whole),
            "moved": largest_difference(whole[0], random_params(0)),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
