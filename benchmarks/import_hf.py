"""Host memory of importing a sharded Hugging Face checkpoint and of exporting it again.

    python benchmarks/import_hf.py --layers 28 --dtype bfloat16 --export

Writes a checkpoint of random bfloat16 weights, by default as wide as Qwen2.5-7B, and imports it in
a process of its own. `import_over_largest`: by how much its peak exceeds the parameters and what
the process held before, over the largest tensor as it is stored; `export_over_largest`: the same of
an export. Memory is resident memory as Linux counts it (VmHWM); `anonymous` is the process' own and
`file` are pages of mapped files, each at its own peak. Prints one JSON line last.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from sizes import add_sizes, model_of

from srft_jax.config import ModelConfig
from srft_jax.models import families
from srft_jax.models.hf_config import to_hf_config
from srft_jax.models.hf_json import write_json

MIB = 2**20


def write_checkpoint(directory: Path, model: ModelConfig, file_bytes: int) -> int:
    """Random bfloat16 weights in files of about so many bytes; the bytes of the largest tensor."""
    shapes = {
        name: families.hf_shape(row, model)
        for row in families.parameters(model)
        for name in families.hf_names(row, model)
    }
    random, part, weight_map, largest = np.random.default_rng(0), {}, {}, 0
    for number, (name, shape) in enumerate(shapes.items()):
        bits = random.integers(0x3C00, 0x3D00, shape, np.uint16)  # 0.008 to 0.03
        part[name] = bits.view(ml_dtypes.bfloat16)
        largest = max(largest, bits.nbytes)
        if sum(one.nbytes for one in part.values()) < file_bytes and number + 1 < len(shapes):
            continue
        file = f"part-{number:05d}.safetensors"
        safetensors.numpy.save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        part = {}
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(directory / "config.json", to_hf_config(model))
    return largest


# In the process that is measured.


def memory() -> dict[str, float]:
    """MiB of this process: resident, its peak, and what of it is anonymous or of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"rss": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon", "file": "RssFile"}
    return {name: int(fields[field].split()[0]) / 1024 for name, field in names.items()}


@contextlib.contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Fills in the peaks of the block; those of anonymous and file pages are looked at in turns."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    done, start = threading.Event(), time.perf_counter()

    def look() -> None:
        while not done.wait(0.002):
            now = memory()
            for name in ("anonymous", "file"):
                found[name] = max(found.get(name, 0.0), now[name])

    thread = threading.Thread(target=look)
    thread.start()
    yield
    done.set()
    thread.join()
    found["peak"], found["seconds"] = memory()["peak"], time.perf_counter() - start


def shown(kind: str, found: dict[str, float]) -> dict[str, float]:
    seconds = found.pop("seconds")
    return {f"{kind}_{name}_mib": value for name, value in found.items()} | {f"{kind}_s": seconds}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    import jax

    from srft_jax.config import MeshConfig
    from srft_jax.mesh import make_mesh
    from srft_jax.models import load_hf, save_hf

    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = make_mesh(MeshConfig(data=1, fsdp=args.devices)) if args.devices > 1 else None
    jax.block_until_ready(jax.jit(jax.numpy.zeros, static_argnums=0)(8))
    before, of_import, of_export = memory(), {}, {}
    with watched(of_import):
        model, params = load_hf(args.directory, mesh=mesh, dtype=args.dtype)
    leaves = jax.tree.leaves(params)
    params_mib = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards) / MIB
    found = {
        "params_mib": params_mib,
        "before_mib": before["rss"],
        "before_anonymous_mib": before["anonymous"],
    }
    found |= shown("import", of_import)
    if args.export:
        time.sleep(1)  # the last tensor is freed a moment after its import
        with watched(of_export):
            save_hf(args.directory / "export", model, params, dtype="bfloat16")
        found |= shown("export", of_export)
    return found


def ratios(found: dict[str, Any], largest: float) -> dict[str, float]:
    rest = found["params_mib"] + found["before_mib"]
    kinds = [kind for kind in ("import", "export") if f"{kind}_peak_mib" in found]
    return {f"{kind}_over_largest": (found[f"{kind}_peak_mib"] - rest) / largest for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    qwen = dict(layers=4, dim=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)
    add_sizes(parser, **qwen)
    parser.add_argument("--devices", type=int, default=1, help="of the CPU, as fsdp")
    parser.add_argument("--file-mib", type=int, default=1024, help="of each file that is read")
    parser.add_argument("--export", action="store_true", help="and write it again")
    parser.add_argument("--directory", type=Path, help="of a checkpoint: measures here and now")
    args = parser.parse_args()
    if args.directory is not None:
        print(json.dumps(measured(args)))
        return
    with tempfile.TemporaryDirectory() as directory:
        largest = write_checkpoint(Path(directory), model_of(args), args.file_mib * MIB) / MIB
        command = [sys.executable, *sys.argv, f"--directory={directory}"]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(run.stdout.splitlines()[-1])
    del args.directory
    found = {"largest_tensor_mib": largest} | found | ratios(found, largest)
    print(json.dumps(vars(args) | {key: float(f"{x:.4g}") for key, x in found.items()}))


if __name__ == "__main__":
    main()
