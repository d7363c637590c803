"""The quickstart's two claims, by whole processes, so that the wall time is what a user waits.

    python benchmarks/quickstart.py --methods srft sft grpo srft_paper sft_rl --seeds 0 1 2

runs each method from the shipped base model with several seeds. The configuration of a method is
configs/<method>_quickstart_arithmetic.yaml, and configs/quickstart.yaml for srft.

    python benchmarks/quickstart.py --bases 0 1 2

makes the base model anew with several seeds, by configs/quickstart_base.yaml, and runs SRFT from
each of them. Both print a table, then one JSON line. `--keep FOLDER` leaves the run directories in
FOLDER/<method>_<seed> or FOLDER/{base,srft}_<seed>; benchmarks/quickstart_figure.py draws from the
former.
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


def config_path(method: str) -> Path:
    """Return the configuration of a method on the quickstart's task."""
    name = "quickstart" if method == "srft" else f"{method}_quickstart_arithmetic"
    return ROOT / "configs" / f"{name}.yaml"


def run(config: Path, seed: int, run_dir: Path, *options: str) -> dict[str, float | int]:
    """Return the wall time and the first and last pass@1 of one whole process."""
    began = time.monotonic()
    command = [sys.executable, "run.py", "--config", str(config), "--seed", str(seed)]
    with open(run_dir.with_suffix(".log"), "w") as log:
        subprocess.run(
            [*command, "--run_dir", str(run_dir), *options], cwd=ROOT, stdout=log, check=True
        )
    wall = time.monotonic() - began
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/held_out/pass@1" in line]
    return {
        "seed": seed,
        "wall_seconds": round(wall, 1),
        "held_out_before": scores[0]["eval/held_out/pass@1"],
        "held_out_after": scores[-1]["eval/held_out/pass@1"],
        "ood_before": scores[0]["eval/ood/pass@1"],
        "ood_after": scores[-1]["eval/ood/pass@1"],
    }


def compare_methods(
    methods: list[str], seeds: list[int], folder: Path
) -> list[dict[str, float | int | str]]:
    """Run every method with every seed from the shipped base; return one row for each run."""
    print("| method | seed | seconds | held-out | out of distribution |\n|---|---|---|---|---|")
    rows: list[dict[str, float | int | str]] = []
    for method in methods:
        for seed in seeds:
            scores = run(config_path(method), seed, folder / f"{method}_{seed}")
            rows.append({"method": method, **scores})
            print(f"| {method} {_table_cells(scores)}", flush=True)
    return rows


def remake_bases(seeds: list[int], folder: Path) -> list[dict[str, float | int | str]]:
    """Make the base model with every seed and run SRFT from each, itself with seed 0.

    The rows of the base and of SRFT follow each other; `base_seed` tells which belong together.
    """
    print("| run | seed | seconds | held-out | out of distribution |\n|---|---|---|---|---|")
    rows: list[dict[str, float | int | str]] = []
    for seed in seeds:
        base_dir = folder / f"base_{seed}"
        base = run(ROOT / "configs" / "quickstart_base.yaml", seed, base_dir)
        print(f"| base {_table_cells(base)}", flush=True)
        model = ("--model.path", str(base_dir / "hf"))
        tuned = run(config_path("srft"), 0, folder / f"srft_{seed}", *model)
        print(f"| srft from it {_table_cells(tuned)}", flush=True)
        rows += [
            {"run": "base", "base_seed": seed, **base},
            {"run": "srft", "base_seed": seed, **tuned},
        ]
    return rows


def _table_cells(scores: dict[str, float | int]) -> str:
    """Return the cells of a table's row after its first one."""
    return (
        "| {seed} | {wall_seconds} | {held_out_before:.1%} -> {held_out_after:.1%} "
        "| {ood_before:.1%} -> {ood_after:.1%} |".format(**scores)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--methods", nargs="+", default=["srft", "sft", "grpo", "srft_paper", "sft_rl"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bases", nargs="+", type=int, help="seeds of bases to make anew")
    parser.add_argument("--keep", type=Path, help="a new folder for the run directories")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)  # runs in a folder that holds some would continue them
        place = contextlib.nullcontext(arguments.keep.absolute())
    else:
        place = tempfile.TemporaryDirectory()
    with place as folder:
        if arguments.bases:
            result = {"quickstart_bases": remake_bases(arguments.bases, Path(folder))}
        else:
            rows = compare_methods(arguments.methods, arguments.seeds, Path(folder))
            result = {"quickstart": rows}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
