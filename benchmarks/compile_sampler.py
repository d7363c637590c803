"""The sampler's programs compiled for TPUs that are not there: time, memory, what a step exchanges.

    JAX_PLATFORMS=cpu python benchmarks/compile_sampler.py --topology v5e:2x4 --fsdp 2

libtpu compiles on any machine that has it installed. The programs get abstract arguments, laid out
as in a run: float32 parameters of a training mesh to the bfloat16 ones of the decode mesh (a layer
at a time, then the rest), a prefill of `--pass-tokens` on each shard of rows, and a segment of
decode steps whose cache is `--capacity` long. `--rows` and `--prompts` count over all devices;
memory is of one device. Prints one JSON line last.

`in_loop`: what the body of the decode loop exchanges a step, and its copies of 1 MiB or more within
the device's memory. `floor_ms`: reading the parameters and all columns of the cache once.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from srft_jax.config import MeshConfig, ModelConfig
from srft_jax.mesh import RULES, decode_mesh, make_mesh, row_shards, sharding
from srft_jax.models import families
from srft_jax.models.config_hf import read_config
from srft_jax.models.decoder import Runtime
from srft_jax.rollout.cache import CacheShape, Places, empty_cache, shard_axes
from srft_jax.rollout.params import conversions, decode_shardings
from srft_jax.rollout.sampler import (
    PackedPrompts,
    Program,
    RowInputs,
    SamplerState,
    decode,
    prefill,
)
from srft_jax.rollout.truncation import Truncation

# Of one chip: memory, of which libtpu keeps some, and how much of it a second can be read.
HBM_GIB = {"v5e": 15.75, "v5p": 95.74}
HBM_GB_PER_S = {"v5e": 819, "v5p": 2765}

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "s8": 1, "u8": 1}
LARGE = 2**20  # a copy of fewer bytes is not counted

Computations = dict[str, list[str]]  # of an HLO module: name -> lines


def abstract(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> Any:
    """An array split by rows; a scalar is everywhere."""
    spec = PartitionSpec(RULES["rows"]) if shape else PartitionSpec()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def training_params(model: ModelConfig, mesh: Mesh) -> Any:
    shapes = families.by_path(
        {
            row.path: jax.ShapeDtypeStruct(families.stacked_shape(row, model), jnp.float32)
            for row in families.parameters(model)
        }
    )
    return with_shardings(shapes, families.param_shardings(mesh, model))


def sampler_state(args: argparse.Namespace, model: ModelConfig, mesh: Mesh) -> SamplerState:
    shape = CacheShape(
        args.rows, args.prompts, args.lanes, args.prompt_capacity, args.capacity, args.segment
    )

    def make() -> SamplerState:
        return SamplerState(
            empty_cache(model, shape, "bfloat16"),
            jnp.zeros((args.prompts, model.dim), "bfloat16"),
            jnp.zeros((args.rows, model.dim), "bfloat16"),
        )

    shapes = jax.eval_shape(make)
    where = jax.tree.map(lambda x: sharding(mesh, shard_axes(x), x.shape), shapes)
    return with_shardings(shapes, where)


def packed_prompts(args: argparse.Namespace, mesh: Mesh) -> PackedPrompts:
    """One pass: so many tokens on each shard of rows, in rows as long as the longest prompt."""
    shards = row_shards(mesh)
    rows = shards * max(1, args.pass_tokens // args.prompt_capacity)
    tokens = abstract(mesh, rows, args.prompt_capacity)
    places = Places(*4 * [abstract(mesh, rows)])
    return PackedPrompts(tokens, tokens, tokens, places, tokens if args.forced else None)


def row_inputs(args: argparse.Namespace, mesh: Mesh) -> RowInputs:
    of_row = abstract(mesh, args.rows)
    return RowInputs(
        keys=abstract(mesh, args.rows, 2, dtype=jnp.uint32),
        requests=of_row,
        members=of_row,
        counts=of_row,
        limits=of_row,
        positions=of_row,
        stop_ids=abstract(mesh, args.rows, 4),
        live=abstract(mesh, args.rows, dtype=bool),
    )


def lowered(args: argparse.Namespace, model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Each program, ready to be compiled."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    mesh = make_mesh(MeshConfig(fsdp=args.fsdp, tensor=args.train_tensor), devices)
    decoding = decode_mesh(mesh, args.tensor)
    params, state = training_params(model, mesh), sampler_state(args, model, decoding)
    of_layer, of_rest = conversions(model, "bfloat16", decoding)
    rest = {k: v for k, v in params.items() if k != "layers"}
    layers = (jax.eval_shape(of_layer, params["layers"], 0),) * model.num_layers
    of_decode = jax.eval_shape(of_rest, rest) | {"layers": layers}
    of_decode = with_shardings(of_decode, decode_shardings(decoding, model))
    program = Program(
        model, Runtime(dtype="bfloat16"), args.temperature, Truncation(top_p=args.top_p)
    )
    with jax.set_mesh(decoding):
        yield "convert_layer", of_layer.lower(params["layers"], 0)
        yield "convert_rest", of_rest.lower(rest)
        packed = packed_prompts(args, decoding)
        of_prefill = of_decode | {"layers": params["layers"]}
        yield "prefill", prefill.lower(of_prefill, state.prompts, packed, program=program)
        rows, enough = row_inputs(args, decoding), abstract(decoding)
        yield "decode", decode.lower(of_decode, state, rows, enough, program=program)


def compiled(name: str, program: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What there is to say about a program: compiled, or why it cannot be."""
    start = time.perf_counter()
    try:
        executable = program.compile()
    except jax.errors.JaxRuntimeError as error:  # out of memory is one
        return {"compiles": False, "error": str(error).splitlines()[0][:300]}
    seconds = time.perf_counter() - start
    memory, hbm = executable.memory_analysis(), HBM_GIB[args.topology.split(":")[0]]
    parts = ("argument", "output", "alias", "temp")
    gib = {part: getattr(memory, f"{part}_size_in_bytes") / 2**30 for part in parts}
    needed = gib["argument"] + gib["output"] - gib["alias"] + gib["temp"]
    text = executable.as_text()
    if args.hlo:
        pathlib.Path(args.hlo, f"{name}.txt").write_text(text)
    found = {"compiles": True, "seconds": seconds, "gib": gib | {"needed": needed}}
    hlo = computations(text)
    found |= {"hbm_gib": hbm, "fits": needed <= hbm} | copies(hlo, "ENTRY")
    if name in ("prefill", "decode"):
        found["state_stays"] = state_stays(program, executable)
    return found | ({"in_loop": in_loop(hlo)} if name == "decode" else {})


def state_stays(program: Any, executable: Any) -> bool:
    """The state comes out laid out as it went in; else the next call would be another program."""
    arrays = jax.tree.leaves(program.out_info[0])
    before = jax.tree.leaves(executable.input_shardings[0][1])
    after = jax.tree.leaves(executable.output_shardings[0])
    return all(
        one.is_equivalent_to(other, array.ndim)
        for array, one, other in zip(arrays, before, after, strict=True)
    )


def computations(text: str) -> Computations:
    found: Computations = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
            found["ENTRY" if entry else line.split()[0].lstrip("%")] = lines = []
        elif line.startswith("  "):
            lines.append(line.strip())
    return found


def called(hlo: Computations, start: str) -> set[str]:
    """Computations that run as part of one, itself included."""
    seen: set[str] = set()
    left = [start]
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            words = (word for line in hlo[name] for word in re.findall(r"=%([\w.\-]+)", line))
            left += [word for word in words if word in hlo]
    return seen


def size_of(line: str) -> int:
    """Bytes of an instruction's result, the first where it has several."""
    match = re.search(r"= \(?(\w+)\[([\d,]*)\]", line)
    if not match:
        return 0
    return BYTES.get(match[1], 4) * math.prod(int(size) for size in match[2].split(",") if size)


def in_loop(hlo: Computations) -> dict[str, Any]:
    """Of the decode loop, the one whose body does most."""
    bodies = re.findall(r" while\(.*body=%([\w.\-]+)", "\n".join(hlo["ENTRY"]))
    body = max(bodies, key=lambda name: len(hlo[name]))
    exchanged: dict[str, list[float]] = {}
    for line in (line for name in called(hlo, body) for line in hlo[name]):
        kind = re.search(rf" ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if kind:
            exchanged.setdefault(kind[1], []).append(size_of(line) / 2**20)
    return {
        kind: {"count": len(sizes), "mib": sum(sizes), "largest_mib": max(sizes)}
        for kind, sizes in sorted(exchanged.items())
    } | copies(hlo, body)


def copies(hlo: Computations, name: str) -> dict[str, Any]:
    """Of at least 1 MiB. What is brought to a product from the device's memory is none."""
    sizes = [
        size_of(line) / 2**20
        for line in hlo[name]
        if re.search(r" (copy|transpose)\(", line) and size_of(line) >= LARGE
    ]
    return {"large_copies": len(sizes), "large_copies_mib": sum(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--architecture", default="assets/architectures/Qwen2.5-Math-7B")
    for name, default in dict(
        layers=28, fsdp=1, train_tensor=4, tensor=4, rows=64, prompts=32, lanes=8,
        prompt_capacity=1024, capacity=2048, segment=32, pass_tokens=8192,
    ).items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--forced", action="store_true", help="some request forces tokens")
    parser.add_argument("--only", nargs="*", default=[], help="programs to compile")
    parser.add_argument("--hlo", help="folder to write the compiled programs to")
    args = parser.parse_args()
    architecture = read_config(pathlib.Path(args.architecture))
    model = dataclasses.replace(architecture, num_layers=args.layers)
    found: dict[str, Any] = {"floor_ms": floor_ms(args, model)}
    for name, program in lowered(args, model):
        if not args.only or name in args.only:
            found[name] = compiled(name, program, args)
            print(name, json.dumps(rounded(found[name])), flush=True)
    print(json.dumps(vars(args) | rounded(found)))


def floor_ms(args: argparse.Namespace, model: ModelConfig) -> float:
    """What a device takes to read its parameters and the whole cache once."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    numbers = sum(math.prod(families.stacked_shape(x, model)) for x in families.parameters(model))
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.dim
    columns = args.rows * (args.capacity + args.segment) + args.prompts * args.prompt_capacity
    of_cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * columns / len(devices)
    read = 2 * ((numbers - lookup) / args.tensor + of_cache)
    return read / 1e6 / HBM_GB_PER_S[args.topology.split(":")[0]]


def rounded(tree: Any) -> Any:
    return jax.tree.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x, tree)


if __name__ == "__main__":
    main()
