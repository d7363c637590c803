"""The quickstart's claim: each method from the same base model, in the same time, several seeds.

    python benchmarks/quickstart.py --methods srft sft grpo srft_paper --seeds 0 1 2

Runs one after the other, each as a whole process, so that the wall time is what a user waits.
Prints a table, then one JSON line. The configuration of a method is
configs/<method>_quickstart_arithmetic.yaml, and configs/quickstart.yaml for srft.
`--keep FOLDER` leaves the run directories in FOLDER/<method>_<seed>, from which
benchmarks/quickstart_figure.py draws.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def config_of(method: str) -> Path:
    name = "quickstart" if method == "srft" else f"{method}_quickstart_arithmetic"
    return ROOT / "configs" / f"{name}.yaml"


def run(method: str, seed: int, run_dir: Path) -> dict[str, float | int | str]:
    """Wall time and pass@1 before and after of one whole process."""
    began = time.monotonic()
    command = [sys.executable, "run.py", "--config", str(config_of(method)), "--seed", str(seed)]
    with open(run_dir.with_suffix(".log"), "w") as log:
        subprocess.run([*command, "--run_dir", str(run_dir)], cwd=ROOT, stdout=log, check=True)
    wall = time.monotonic() - began
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/held_out/pass@1" in line]
    return {
        "method": method,
        "seed": seed,
        "wall_seconds": round(wall, 1),
        "held_out_before": scores[0]["eval/held_out/pass@1"],
        "held_out_after": scores[-1]["eval/held_out/pass@1"],
        "ood_before": scores[0]["eval/ood/pass@1"],
        "ood_after": scores[-1]["eval/ood/pass@1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["srft", "sft", "grpo", "srft_paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="a new folder for the run directories")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)  # runs in a folder that holds some would continue them
        place = contextlib.nullcontext(arguments.keep.absolute())
    else:
        place = tempfile.TemporaryDirectory()
    results = []
    print("| method | seed | seconds | held-out | out of distribution |\n|---|---|---|---|---|")
    with place as folder:
        for method in arguments.methods:
            for seed in arguments.seeds:
                row = run(method, seed, Path(folder) / f"{method}_{seed}")
                results.append(row)
                print(
                    "| {method} | {seed} | {wall_seconds} | {held_out_before:.1%} -> "
                    "{held_out_after:.1%} | {ood_before:.1%} -> {ood_after:.1%} |".format(**row),
                    flush=True,
                )
    print(json.dumps({"quickstart": results}))


if __name__ == "__main__":
    main()
