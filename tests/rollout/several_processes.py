"""Processes that sample together, each with requests of its own; prints their completions.

A script of its own, run once for each process with PORT NUMBER as arguments, and once without: this
one samples for each process as if the other were not there.
"""

import json
import sys

import jax
from sharded_sampling import CONFIG, policy

from srft_jax.batch import Trajectory
from srft_jax.config import MeshConfig, UsageError
from srft_jax.mesh import make_mesh
from srft_jax.models import families
from srft_jax.rollout import Request, SamplingConfig, sample

# For process 0 and for process 1: more and fewer, longer and shorter, with and without forced
# tokens and stop ids, none at all.
ROUNDS = [
    (
        [
            Request([3, 1, 4, 1, 5], group_size=5, max_new_tokens=40),
            Request([5, 3, 5, 8, 9, 7, 9, 3, 2] * 4, group_size=3, stop_ids=(4, 7, 9, 11, 13)),
            Request([2, 7], group_size=2, forced=[1, 8, 2]),
        ],
        [Request([9, 2, 6], group_size=2, max_new_tokens=3)],
    ),
    ([], [Request([9, 2, 6], group_size=3, max_new_tokens=40), Request([3], max_new_tokens=1)]),
    ([], []),
]
TENSOR = [1, 2, 2]  # devices to a copy of the parameters


def main(*place: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_default_matmul_precision", "highest")
    print(json.dumps(together(*map(int, place)) if place else [alone(0), alone(1)]))


def alone(number: int) -> list:
    return [listed(complete(policy(), number, requests[number])) for requests in ROUNDS]


def together(port: int, number: int) -> list:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    params = jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
        policy(),
        families.param_shardings(mesh, CONFIG),
    )
    with jax.set_mesh(mesh):
        try:
            complete(params, number, [], tensor=4)
            raise AssertionError("a copy of the parameters was split over both processes")
        except UsageError as error:
            assert "tensor = 4 does not divide the 2 devices of a process" in str(error)
        return [
            listed(complete(params, number, requests[number], tensor))
            for requests, tensor in zip(ROUNDS, TENSOR, strict=True)
        ]


def complete(
    params: object, number: int, requests: list[Request], tensor: int | None = None
) -> list[list[Trajectory]]:
    config = SamplingConfig(temperature=0.8, max_new_tokens=20, slots=8, segment=16, tensor=tensor)
    return sample(params, CONFIG, requests, jax.random.key(number), config)


def listed(groups: list[list[Trajectory]]) -> list:
    """[tokens, log-probs] of every completion."""
    return [[t.tokens.tolist(), t.logprobs.tolist()] for group in groups for t in group]


if __name__ == "__main__":
    main(*sys.argv[1:])
