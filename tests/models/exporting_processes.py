"""Two processes that import a model together, each its own slices, and export it again.

A script of its own, run once for each process with PORT NUMBER DIRECTORY as arguments. They share
the model that is read, DIRECTORY/first, but not where it is written: process 0 alone writes.
"""

import sys
from pathlib import Path

import jax

from srft_jax.config import MeshConfig
from srft_jax.mesh import make_mesh
from srft_jax.models import load_hf, save_hf


def main(port: str, number: str, directory: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    config, params = load_hf(Path(directory) / "first", mesh=mesh)
    path = Path(directory) / number / "hf"
    save_hf(path, config, params, dtype="bfloat16", part_bytes=9_000)
    shards = params["embedding"].addressable_shards
    print(len(shards), "of", mesh.size, "shards of the embedding")


if __name__ == "__main__":
    main(*sys.argv[1:])
