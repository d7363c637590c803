"""Training and sampling of one model on one GPU, beside the same work in PyTorch in one run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --architecture assets/architectures/Qwen2.5-Math-7B --microbatches 2

Each of `train` and `sample`, by each of `ours` and `torch`, runs in a process of its own, so that
none finds memory taken by another; one that fails is reported with its last line. Weights are
random, of the shapes in `--architecture`; nothing stops a completion before its length.

Train: `--microbatches` rows of `--row-length` tokens, each of `--sequences` sequences packed, then
one update; float32 master weights, AdamW, clipping, products in `--dtype`. Ours is the train step
of a run on SRFT; PyTorch computes log-prob, entropy and a weighted likelihood, compiled, SDPA,
with its sequences as a batch [sequences, length], where ours has segment ids. `mfu`: FLOPs
3 (2 n_mm tokens + 4 T^2 N H L sequences), T the length of a sequence, n_mm all parameters but an
input embedding that is not the head too, no credit for causality or recomputation, over the card's
dense bfloat16 peak. `over_matmul`: the same at the rate of a bare (x @ w) @ y, timed beside it.

Sample: `--batch` prompts of `--prompt` tokens and `--new` new ones each, parameters in `--dtype`.
`over_floor`: seconds of a decode step over reading the parameters and the used cache once at the
card's peak bandwidth. Prints one JSON line last.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

PARTS = ("ours_train", "torch_train", "ours_sample", "torch_sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", default="assets/architectures/Qwen2.5-Math-1.5B")
    parser.add_argument("--layers", type=int, help="fewer than the architecture has")
    for name, default in dict(
        row_length=8192, sequences=4, microbatches=4, logits_mib=1024,
        batch=64, prompt=512, new=512, segment=64, iters=5,
    ).items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--remat", choices=["none", "dots", "block"], default="dots")
    parser.add_argument("--attention", choices=["auto", "xla", "cudnn"], default="auto")
    parser.add_argument("--torch-checkpoint", action="store_true", help="recompute its blocks too")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch eager")
    parser.add_argument("--only", nargs="*", default=PARTS, help="parts to run")
    parser.add_argument("--part", choices=PARTS, help="of the process at hand; set by the first")
    args = parser.parse_args()
    if args.row_length % args.sequences:
        parser.error(f"--sequences {args.sequences} does not divide --row-length {args.row_length}")
    if args.part:
        print(json.dumps(rounded(run_here(args))))
        return
    found: dict[str, Any] = {part: run_alone(part) for part in args.only}
    print(json.dumps(vars(args) | found | compared(found)))


def run_here(args: argparse.Namespace) -> dict[str, Any]:
    side, task = args.part.split("_")
    module = importlib.import_module(f"gpu_{side}")
    return module.train(args) if task == "train" else module.sample(args)


def run_alone(part: str) -> dict[str, Any]:
    """The part in a process of its own."""
    if part.startswith("torch") and importlib.util.find_spec("torch") is None:
        return {"error": "torch is not installed"}
    # Nearly all memory, and tracebacks that end with their error.
    options = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", "JAX_TRACEBACK_FILTERING": "off"}
    command = [sys.executable, *sys.argv, "--part", part]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit code {done.returncode}"
    found = json.loads(last) if done.returncode == 0 else {"error": last[:500]}
    print(part, json.dumps(found), flush=True)
    return found


def compared(found: dict[str, Any]) -> dict[str, float]:
    """Ours over PyTorch's, where both are there and are the same model."""
    ratios = {}
    for task in ("train", "sample"):
        ours, theirs = (found.get(f"{side}_{task}", {}) for side in ("ours", "torch"))
        if "tokens_per_s" in ours and "tokens_per_s" in theirs:
            assert ours["params"] == theirs["params"], (ours["params"], theirs["params"])
            ratios[f"{task}_over_torch"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
    return rounded(ratios)


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


if __name__ == "__main__":
    main()
