"""The head on meshes of eight devices against one device; prints the largest relative differences.

A script of its own, since the number of devices cannot change once JAX has started.
"""

import json

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from test_head_loss import Rows, objective

from srft_jax.config import MeshConfig
from srft_jax.mesh import RULES, make_mesh
from srft_jax.ops.head import Reference, token_loss
from srft_jax.ops.head_passes import HeadTileSizes

N, D, V = 48, 8, 520
# Where logits are not kept, a device has several row tiles, and not all devices equally many.
TILE_SIZES = HeadTileSizes(most_rows=4, most_columns=128)
MESHES = {
    "8x1x1x1": (8, 1, 1, 1),
    "2x2x1x2": (2, 2, 1, 2),
    "1x2x2x2": (1, 2, 2, 2),
    "1x4x1x2": (1, 4, 1, 2),
    "1x1x1x8": (1, 1, 1, 8),
}


def problem() -> tuple[tuple, tuple, Rows]:
    random = np.random.default_rng(0)
    arrays = [random.normal(size=size).astype(np.float32) for size in ((N, D), (D, V)) * 2]
    targets = random.integers(0, V, N).astype(np.int32)
    mask = (np.arange(N) % 7 > 1) & (np.arange(N) > 11)  # some devices have fewer rows, or none
    weight = random.normal(size=(N, 3)).astype(np.float32)
    return tuple(arrays[:2]), tuple(arrays[2:]), Rows(targets, mask, weight)


def run(elementwise: bool, logits_bytes: int, transposed: bool) -> tuple:
    """A fresh program that returns value, statistics and gradients."""

    def loss(params: tuple, other: tuple, rows: Rows) -> tuple:
        turn = (lambda x: x.T) if transposed else (lambda x: x)
        return token_loss(
            params[0],
            turn(params[1]),
            rows,
            objective,
            temperature=0.7,
            elementwise=elementwise,
            reference=Reference(other[0], turn(other[1])),
            transposed=transposed,
            logits_bytes=logits_bytes,
            tile_sizes=TILE_SIZES,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def placed(mesh: jax.sharding.Mesh, inputs: tuple) -> tuple:
    """Rows over context, data and fsdp, the head over fsdp and tensor, as parameters are."""

    def place(x: np.ndarray) -> jax.Array:
        rows = PartitionSpec(RULES["rows"])
        spec = rows if x.shape[0] == N else PartitionSpec("fsdp", "tensor")
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, inputs)


def difference(got: object, expected: object) -> float:
    """Largest difference of an array in two trees, relative to its largest element."""

    def leaf_difference(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / np.abs(b).max())

    return max(map(leaf_difference, jax.tree.leaves(got), jax.tree.leaves(expected)))


def collectives_in_loops(mesh: jax.sharding.Mesh, inputs: tuple) -> int:
    """Elements of the largest array that devices exchange inside a loop."""
    jaxpr = jax.make_jaxpr(run(True, 2**20, False))(*inputs)

    def largest(jaxpr: object, in_loop: bool) -> int:
        size = 0
        for equation in jaxpr.eqns:
            if in_loop and equation.primitive.name in ("psum", "psum_invariant", "pmax"):
                size = max([size, *(v.aval.size for v in equation.invars)])
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                size = max(size, largest(inner, in_loop or equation.primitive.name == "while"))
        return size

    return largest(jaxpr.jaxpr, False)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    inputs = problem()
    results = {}
    for route in ((True, 2**20, False), (True, 4096, True), (False, 2**20, False)):
        expected = run(*route)(*inputs)
        assert abs(expected[0][0]) > 1
        for name, shape in MESHES.items():
            mesh = make_mesh(MeshConfig(*shape))
            with jax.set_mesh(mesh):
                got = run(*route)(*placed(mesh, inputs))
                results[f"{name} {route}"] = difference(got, expected)
                assert jnp.shape(got[1][1]) == (D, V)
                if name == "2x2x1x2" and route[0]:
                    results["exchanged in loops"] = collectives_in_loops(mesh, inputs)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
