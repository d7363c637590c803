"""The sampler's programs compiled for TPUs that are not there: what a decode step sends, copies.

    JAX_PLATFORMS=cpu python benchmarks/compile_sampler.py --topology v5e:2x4 --fsdp 2

`run.py plan` says what a run's programs take; this looks into those of the sampler, at sizes given
as flags: parameters of a training mesh to the decode mesh, a prefill of `--pass-rows` on each shard
of rows, and a segment of decode steps whose cache is `--capacity` long. `--rows` and `--prompts`
count over all devices; memory is of one device. Prints one JSON line last.

`in_loop`: what the body of the decode loop sends a step, and its copies of 1 MiB or more within
the device's memory. `floor_ms`: reading the parameters and all columns of the cache once.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax

from srft_jax.config import MeshConfig, Truncation
from srft_jax.mesh import decode_mesh, make_mesh
from srft_jax.models.hf_config import read_config
from srft_jax.planning.hlo.count import count_module
from srft_jax.planning.hlo.parser import Computation, Module, parse_hlo
from srft_jax.planning.program_costs import bytes_on_device, trips_by_scope
from srft_jax.planning.sampler_programs import (
    abstract_decode_params,
    abstract_sampler_state,
    lowered_sampler,
)
from srft_jax.planning.topology import Topology, find_topology, prepare_backend
from srft_jax.rollout import SamplingConfig
from srft_jax.rollout.cache import CacheShape
from srft_jax.training.state import abstract_params

LARGE = 2**20  # a copy of fewer bytes is not counted


def compiled(name: str, program: Any, args: argparse.Namespace, topology: Topology) -> Any:
    """Compile a program; return its time, memory and copies, or why it cannot be compiled."""
    start = time.perf_counter()
    try:
        executable = program.compile()
    except jax.errors.JaxRuntimeError as error:  # out of memory is one
        return {"compiles": False, "error": str(error).splitlines()[0][:300]}
    seconds = time.perf_counter() - start
    memory, text = executable.memory_analysis(), executable.as_text()
    parts = ("argument", "output", "alias", "temp")
    gib = {part: getattr(memory, f"{part}_size_in_bytes") / 2**30 for part in parts}
    needed = gib["argument"] + gib["output"] - gib["alias"] + gib["temp"]
    if args.hlo:
        pathlib.Path(args.hlo, f"{name}.txt").write_text(text)
    module = parse_hlo(text)
    figures = {"compiles": True, "seconds": seconds, "gib": gib | {"needed": needed}}
    figures |= {"fits": needed <= topology.chip.hbm / 2**30} | copies(module.entry)
    if name in ("prefill", "decode"):
        figures["state_stays"] = state_stays(program, executable)
    return figures | (
        {"in_loop": in_loop(module, len(topology.devices))} if name == "decode" else {}
    )


def state_stays(program: Any, executable: Any) -> bool:
    """Return whether the state leaves a program in the layout in which it came.

    If it does not, the next call compiles another program.
    """
    arrays = jax.tree.leaves(program.out_info[0])
    before = jax.tree.leaves(executable.input_shardings[0][1])
    after = jax.tree.leaves(executable.output_shardings[0])
    return all(
        sharding.is_equivalent_to(new_sharding, array.ndim)
        for array, sharding, new_sharding in zip(arrays, before, after, strict=True)
    )


def in_loop(module: Module, num_devices: int) -> dict[str, Any]:
    """Count what the decode loop, the one whose body does most, sends and copies in a step."""
    instructions = module.entry.instructions.values()
    loops = [instruction for instruction in instructions if instruction.opcode == "while"]
    bodies = [module.computations[loop.computation_name("body") or ""] for loop in loops]
    body = max(bodies, key=lambda computation: len(computation.instructions))
    step = count_module(dataclasses.replace(module, entry=body), trips_by_scope({}, 1), num_devices)
    sent = {
        f"{kind} of {len(group)}": size / 2**20 for (kind, group), size in step.collectives.items()
    }
    return {"sent_mib": sent, "hbm_mib": step.hbm_bytes / 2**20} | copies(body)


def copies(computation: Computation) -> dict[str, Any]:
    """Count copies of at least 1 MiB; what a product reads from the device's memory is no copy."""
    sizes = [
        instruction.shapes[0].bytes / 2**20
        for instruction in computation.instructions.values()
        if instruction.opcode in ("copy", "transpose") and instruction.shapes[0].bytes >= LARGE
    ]
    return {"large_copies": len(sizes), "large_copies_mib": sum(sizes)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    prepare_backend(args.topology)
    topology = find_topology(args.topology)
    architecture = read_config(pathlib.Path(args.architecture))
    model = dataclasses.replace(architecture, num_layers=args.layers)
    sizes = MeshConfig(fsdp=args.fsdp, tensor=args.train_tensor)
    mesh = make_mesh(sizes, topology.devices)
    decoding = decode_mesh(mesh, args.tensor)
    shape = CacheShape(
        args.rows, args.prompts, args.lanes, args.prompt_capacity, args.capacity, args.segment
    )
    sampling = SamplingConfig(
        temperature=args.temperature, truncation=Truncation(top_p=args.top_p), dtype="bfloat16"
    )
    params = abstract_params(model, mesh)
    copy = abstract_decode_params(params, model, decoding, "bfloat16")
    # Few rows of an embedding are read; a tied one is the head too, and read whole.
    copy.pop("embedding" if not model.tie_embeddings else "final_norm")
    state = abstract_sampler_state(model, shape, decoding, "bfloat16")
    read = bytes_on_device((copy, state))
    figures: dict[str, Any] = {"floor_ms": 1e3 * read / topology.chip.hbm_rate}
    programs = lowered_sampler(
        *(params, model, decoding, shape),
        sampling=sampling,
        pass_rows=args.pass_rows,
        forced=args.forced,
    )
    for name, program in programs:
        if not args.only or name in args.only:
            figures[name] = compiled(name, program, args, topology)
            print(name, json.dumps(rounded(figures[name])), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--architecture", default="assets/architectures/Qwen2.5-Math-7B")
    for name, default in dict(
        layers=28, fsdp=1, train_tensor=4, tensor=4, rows=64, prompts=32, lanes=8,
        prompt_capacity=1024, capacity=2048, segment=32, pass_rows=8,
    ).items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--forced", action="store_true", help="some request forces tokens")
    parser.add_argument("--only", nargs="*", default=[], help="programs to compile")
    parser.add_argument("--hlo", help="folder to write the compiled programs to")
    args = parser.parse_args()
    print(json.dumps(vars(args) | rounded(measure(args))))


def rounded(tree: Any) -> Any:
    return jax.tree.map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x, tree)


if __name__ == "__main__":
    main()
