"""What a train step holds on each device under each policy and optimizer, by XLA's accounting.

    python benchmarks/memory.py --topology cpu:1
    python benchmarks/memory.py --topology v5e:2x2 --training.rows_per_microbatch=8

The run's own step is compiled from abstract shapes, as the verb plan does; TPUs need not be there,
but libtpu must be. What follows --topology are keys of a run, by default the small model of
`sizes.py`, in architectures/small, over rows of 1,024 tokens. Every variant changes one thing of
the first. MiB of a device; `host` is of its machine. Prints one JSON line last.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from srft_jax.config import RunConfig, parse
from srft_jax.planning.topology import Topology, find_topology, prepare_backend
from srft_jax.planning.train_program import lowered_train_step
from srft_jax.report.terminal import table
from srft_jax.setup.plan_checks import outline_for_plan
from srft_jax.tasks.plan import planned

SMALL = [
    f"--model.architecture={Path(__file__).parent}/architectures/small",
    "--data.max_prompt_tokens=256",
    "--rollout.max_new_tokens=768",
    "--training.row_length=1024",
    "--training.rows_per_microbatch=4",
    "--model.remat=none",
]
VARIANTS = {
    "remat none": [],
    "remat dots": ["--model.remat=dots"],
    "remat block": ["--model.remat=block"],
    "remat offload": ["--model.remat=offload"],
    "bfloat16 activations": ["--model.dtype=bfloat16"],
    "half the rows": [],
    "moments in bfloat16": ["--training.optimizer.state_dtype=bfloat16"],
    "muon": ["--training.optimizer.name=muon"],
    "muon in bfloat16": [
        "--training.optimizer.name=muon",
        "--training.optimizer.state_dtype=bfloat16",
    ],
    "adafactor": ["--training.optimizer.name=adafactor"],
}


def halved(config: RunConfig) -> RunConfig:
    training = config.training
    fewer = dataclasses.replace(training, rows_per_microbatch=training.rows // 2)
    return dataclasses.replace(config, training=fewer)


def measure(config: RunConfig, topology: Topology) -> dict[str, float]:
    """MiB by XLA; seconds to compile."""
    run = planned(outline_for_plan(config, topology.devices))
    lowered: Any = lowered_train_step(run)
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    found = {
        "state_and_batch": memory.argument_size_in_bytes,
        "in_place": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "host": memory.host_temp_size_in_bytes,
    }
    mib = {name: round(size / 2**20, 1) for name, size in found.items()}
    return mib | {"compile_s": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="cpu:1")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args, keys = parser.parse_known_args()
    prepare_backend(args.topology)
    topology, results = find_topology(args.topology), {}
    for name in args.only:
        config = parse([*SMALL, *keys, *VARIANTS[name]])[1]
        results[name] = measure(halved(config) if name == "half the rows" else config, topology)
        print(name, results[name], flush=True)
    columns = list(next(iter(results.values())))
    print(table(["", *columns], [[name, *row.values()] for name, row in results.items()]))
    print(json.dumps({"topology": args.topology, "keys": keys, "mib": results}))


if __name__ == "__main__":
    main()
