"""Attention over packed rows, forward and backward: time here, or the program for TPUs.

    python benchmarks/attention.py --length 4096 --segments 8
    python benchmarks/attention.py --topology v5p:2x2x1 --kernel splash \
        --model qwen2.5-7b --length 8192 --dtype bfloat16

Rows hold `--segments` sequences of one length. With a topology nothing runs: libtpu compiles the
kernel for `--context` x `--tensor` of its devices, the rest of them with rows of their own.
`temp_mib` is what XLA allocates on a device beside arguments and results; `kernels` counts calls of
Pallas kernels in the compiled program. Prints one JSON line last.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srft_jax.config import MeshConfig
from srft_jax.mesh import RULES, make_mesh
from srft_jax.ops.attention import ScoreOptions
from srft_jax.ops.mesh_attention import mesh_attention
from srft_jax.planning.topology import find_topology, prepare_backend

# Query heads, kv heads, head dim, softcap, window; of a window half the layers, chosen by the
# device.
SHAPES = {
    "tiny": (4, 2, 64, None, None),
    "qwen2.5-0.5b": (14, 2, 64, None, None),
    "qwen2.5-1.5b": (12, 2, 128, None, None),
    "qwen2.5-7b": (28, 4, 128, None, None),
    "llama-3.1-8b": (32, 8, 128, None, None),
    "gemma-3-1b": (4, 1, 256, None, 512),
    "capped": (8, 4, 128, 50.0, 1024),
}


def gradient(args: argparse.Namespace) -> Callable[..., Any]:
    """Of the sum of attention, by queries, keys and values."""
    _, _, head_dim, softcap, window = SHAPES[args.model]

    def total(*inputs: Any) -> Any:
        *inputs, slides = inputs
        out = mesh_attention(
            *(*inputs, ScoreOptions(head_dim**-0.5, softcap), window),
            slides=slides if window else None,
            parts=args.context,
            kernel=args.kernel,
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    return jax.jit(jax.grad(total, argnums=(0, 1, 2)))


def shapes(args: argparse.Namespace, num_rows: int) -> list[tuple[tuple[int, ...], Any]]:
    """Of queries, keys, values, segments, and whether the window holds; in parts of rows."""
    heads, kv_heads, head_dim, *_ = SHAPES[args.model]
    rows, length = num_rows * args.context, args.length // args.context
    of_keys = ((rows, kv_heads, length, head_dim), args.dtype)
    of_query = ((rows, length, heads, head_dim), args.dtype)
    return [of_query, of_keys, of_keys, ((rows, length), "int32"), ((), "bool")]


def abstract(mesh: Mesh, shape: Sequence[int], dtype: Any) -> Any:
    """Rows over devices; heads are split in the program."""
    spec = PartitionSpec(RULES["rows"]) if shape else PartitionSpec()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compiled_for(args: argparse.Namespace) -> dict[str, Any]:
    prepare_backend(args.topology)
    topology = find_topology(args.topology)
    sizes = MeshConfig(data=1, fsdp=-1, context=args.context, tensor=args.tensor)
    mesh = make_mesh(sizes, topology.devices)
    inputs = [abstract(mesh, *one) for one in shapes(args, args.batch * mesh.shape["fsdp"])]
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        lowered = gradient(args).lower(*inputs)
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
    return {
        "lower_s": lowered_at - start,
        "compile_s": time.perf_counter() - lowered_at,
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def timed_here(args: argparse.Namespace) -> dict[str, Any]:
    """The fastest of some runs, each of them waited for."""
    random = np.random.default_rng(0)
    *arrays, (ids_shape, _), _ = shapes(args, args.batch)
    inputs = [jnp.asarray(random.normal(size=shape), dtype) for shape, dtype in arrays]
    ids = np.broadcast_to(1 + np.arange(args.length) * args.segments // args.length, ids_shape)
    inputs += [jnp.asarray(ids, jnp.int32), jnp.bool_(True)]
    compiled = gradient(args).lower(*inputs).compile()
    times = []
    for _ in range(args.iters):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    return {
        "ms_min": 1e3 * min(times),
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(SHAPES), default="tiny")
    parser.add_argument("--kernel", choices=["xla", "splash", "cudnn"], default="xla")
    parser.add_argument("--topology", help="compile for it instead, e.g. v5e:2x4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    defaults = dict(length=2048, batch=1, segments=1, iters=5, context=1, tensor=1)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    found = compiled_for(args) if args.topology else timed_here(args)
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(vars(args) | shown))


if __name__ == "__main__":
    main()
