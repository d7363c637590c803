"""Completions on meshes of eight devices against one device; prints differences and what is held.

A script of its own, since the number of devices cannot change once JAX has started. Its arguments
are names of `CASES`.
"""

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.monitoring
import numpy as np
from jax.sharding import Mesh

from srft_jax.batch import KVCache, Trajectory
from srft_jax.config import MeshConfig, ModelConfig, Truncation
from srft_jax.host.compilations import Compilations
from srft_jax.mesh import decode_mesh, make_mesh
from srft_jax.models import families, init_params
from srft_jax.rollout import Request, Sampler, SamplingConfig, engine, sample
from srft_jax.rollout.decode_layout import decode_params

CONFIG = ModelConfig(
    vocab_size=24,
    dim=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    rope_theta=10_000.0,
)
# 22 completions for at most 16 slots, with own parts of 0, 32 and 64 tokens.
REQUESTS = [
    Request([3, 1, 4, 1, 5], group_size=6, max_new_tokens=44),
    Request([9, 2, 6], group_size=5, max_new_tokens=20, stop_ids=(4, 7, 9, 11, 13)),
    Request([5, 3, 5, 8, 9, 7, 9, 3, 2] * 4, group_size=4),
    Request([5, 3, 5, 8], group_size=4, forced=[2, 7, 1], max_new_tokens=9),
    Request([3], group_size=3),
]


@functools.cache
def policy() -> dict:
    """At a scale that makes distributions that are neither flat nor certain."""
    return jax.tree.map(lambda x: 4.0 * np.asarray(x), init_params(CONFIG, jax.random.key(7)))


class Case(NamedTuple):
    """A mesh (data, fsdp, context, tensor) to train on, `tensor` to decode on, and how to draw."""

    mesh: tuple[int, int, int, int]
    tensor: int | None
    temperature: float = 0.8
    truncation: Truncation = Truncation()
    is_late: bool = False  # most requests are submitted while the last one runs
    is_outside: bool = False  # the sampler is made on one device, before the mesh is in context
    is_passed: bool = False  # the mesh is an argument of the sampler, and never in context


CASES = {
    "rows over 8": Case((8, 1, 1, 1), None),
    "tensor as trained": Case((4, 1, 1, 2), None),
    "rows that grow": Case((4, 1, 1, 2), None, is_late=True),
    "made outside of the mesh": Case((4, 1, 1, 2), None, is_outside=True),
    "mesh passed": Case((4, 1, 1, 2), None, is_passed=True),
    "greedy": Case((4, 1, 1, 2), None, temperature=0.0),
    "truncated": Case((4, 1, 1, 2), None, truncation=Truncation(top_k=12, top_p=0.9)),
    "context to rows over 8": Case((1, 2, 2, 2), 1),
    "fsdp to tensor 2": Case((2, 2, 1, 2), 2),
    "kv heads do not divide": Case((2, 2, 1, 2), 4),
    "one replica": Case((1, 2, 2, 2), 8),
}
_KEYS_AND_VALUES = (
    "prompt_keys",
    "prompt_values",
    "keys",
    "values",
    "recent_keys",
    "recent_values",
)
_COLLECTIVE = re.compile(
    r"= (.+?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    wanted: dict = {}
    results = {}
    for name in sys.argv[1:]:
        case = CASES[name]
        how = (case.temperature, case.truncation)
        if how not in wanted:
            alone = Case(case.mesh, None, *how)
            wanted[how] = complete(alone, policy())
        results[name] = on_mesh(case, wanted[how])
    print(json.dumps(results))


def on_mesh(case: Case, wanted: list[list[Trajectory]]) -> dict:
    mesh = make_mesh(MeshConfig(*case.mesh))
    params = policy()
    if not case.is_outside:
        params = jax.device_put(params, families.param_shardings(mesh, CONFIG))
    passed = mesh if case.is_passed else None
    with jax.set_mesh(None if case.is_passed else mesh):
        with segments() as (seen, hlo):
            got = complete(case, params, passed)
        with Compilations() as compilations:
            again = complete(case, params, passed)
    assert difference(again, got)["tokens"] == 0
    on = decode_mesh(mesh, case.tensor or case.mesh[3])
    return difference(got, wanted) | {
        "compiled again": compilations.since_last()[0]["perf/compilations"],
        "capacities": sorted({segment.capacity for segment in seen}),
        "copies": max(segment.copies for segment in seen),
        "devices": sorted({segment.devices for segment in seen}),
        "exchanged": max(sizes(hlo[0])),
        "widest parameters exchanged": widest_parameters(mesh, on),
    }


def complete(case: Case, params: object, mesh: Mesh | None = None) -> list[list[Trajectory]]:
    config = SamplingConfig(
        temperature=case.temperature,
        truncation=case.truncation,
        max_new_tokens=30,
        slots=16,
        segment=16,
        tensor=case.tensor,
    )
    key = jax.random.key(11)
    if not (case.is_late or case.is_outside or mesh):
        return sample(params, CONFIG, REQUESTS, key, config)
    with jax.set_mesh(None) if case.is_outside else contextlib.nullcontext():
        sampler = Sampler(CONFIG, config, mesh)
    groups: list[list[Trajectory]] = [[] for _ in REQUESTS]
    sampler.update(params)
    last = dataclasses.replace(REQUESTS[-1], group=len(REQUESTS) - 1)
    sampler.submit([last] if case.is_late else REQUESTS, key)
    for trajectory in sampler.stream():
        if case.is_late and not any(groups):
            sampler.submit(REQUESTS[:-1], key)
        groups[trajectory.group].append(trajectory)
    return [sorted(group, key=lambda trajectory: trajectory.member) for group in groups]


def difference(got: list[list[Trajectory]], wanted: list[list[Trajectory]]) -> dict:
    """Completions with other tokens, and the largest difference of what is said of the tokens."""
    pairs = [pair for groups in zip(got, wanted, strict=True) for pair in zip(*groups, strict=True)]
    other = [a for a, b in pairs if a.tokens.tolist() != b.tokens.tolist()]
    names = ("logprobs", "entropies")
    floats = [
        float(np.abs(getattr(a, name) - getattr(b, name)).max())
        for a, b in pairs
        for name in names
        if len(a.tokens) == len(b.tokens)
    ]
    return {"tokens": len(other), "floats": max(floats), "completions": len(pairs)}


class Segment(NamedTuple):
    """A capacity of the own parts, how often the cache is held, and on how many devices."""

    capacity: int
    copies: float
    devices: int


@contextlib.contextmanager
def segments() -> Iterator[tuple[list[Segment], list[str]]]:
    """Fills a list with an entry for each segment, one with the HLO of the first that settles."""
    seen: list[Segment] = []
    hlo: list[str] = []
    decode = engine.decode

    def spy(params: object, state: engine.SamplerState, *args: object, **kwargs: object) -> object:
        capacity = state.cache.values[0].shape[2]
        if capacity and not hlo:
            hlo.append(decode.lower(params, state, *args, **kwargs).compile().as_text())
        result = decode(params, state, *args, **kwargs)
        cache = result[0].cache
        seen.append(Segment(capacity, copies(cache), len(cache.values[0].sharding.device_set)))
        return result

    engine.decode = spy
    yield seen, hlo
    engine.decode = decode


def copies(cache: KVCache) -> float:
    """How often the worst kept keys or values are held, over all devices; empty ones are not."""
    leaves = [leaf for name in _KEYS_AND_VALUES for leaf in getattr(cache, name) if leaf.size]
    return max(
        sum(shard.data.size for shard in leaf.addressable_shards) / leaf.size for leaf in leaves
    )


def sizes(hlo: str, dtype: str = r"\w+") -> list[int]:
    """Elements of what devices exchange."""
    shapes = re.findall(rf"\b{dtype}\[([\d,]*)\]", " ".join(_COLLECTIVE.findall(hlo)))
    return [int(np.prod([int(n) for n in shape.split(",") if n] or [1])) for shape in shapes] + [0]


def widest_parameters(mesh: Mesh, on: Mesh) -> int:
    """Elements of the largest float32 array that is exchanged to make half precision parameters.

    float16, since XLA on CPU exchanges bfloat16 as float32.
    """
    shapes = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        policy(),
        families.param_shardings(mesh, CONFIG),
    )
    convert = jax.jit(lambda params: decode_params(params, CONFIG, "float16", on))
    with jax.set_mesh(mesh):
        return max(sizes(convert.lower(shapes).compile().as_text(), "f32"))


if __name__ == "__main__":
    main()
