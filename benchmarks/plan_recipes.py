"""Whether every recipe fits every hardware, and how fast it would be: `run.py plan` for each.

    TPU_LIBRARY_PATH=.../libtpu.so JAX_PLATFORMS=cpu python benchmarks/plan_recipes.py

One after the other, as only one process can hold libtpu; each in a process of its own. What differs
between methods is small but for the second optimizer of sft_rl: `--methods srft sft_rl` has nearly
all there is to know. Prints a table and one JSON line last.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GIB = 2**30


def names_in(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / folder).iterdir())


def plan(recipe: str, hardware: str) -> dict[str, Any]:
    """What the verb says of the recipe there, or why it says nothing."""
    files = [f"configs/hardware/{hardware}.yaml", f"configs/recipes/{recipe}.yaml"]
    flags = [f"--config={file}" for file in (*files, "configs/data/openr1_math_46k.yaml")]
    command = [sys.executable, "run.py", "plan", *flags, "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    found = json.loads(lines[-1]) if lines[-1].startswith("{") else {"error": lines[-1][:300]}
    return found | {"plan_seconds": time.perf_counter() - start}


def row(recipe: str, hardware: str, found: dict[str, Any]) -> str:
    name = recipe.removesuffix("_openr1_math_46k")
    if "error" in found:
        return f"| `{name}` | {hardware} | {found['error']} | | | | | |"
    phase, sizes = max(found["hbm_by_purpose"].items(), key=lambda item: sum(item[1].values()))
    purposes = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    largest = ", ".join(f"{purpose} {size / GIB:.1f}" for purpose, size in purposes)
    cells = [
        f"`{name}`",
        hardware,
        "yes" if found["fits"] else "no",
        f"{found['hbm_bytes_per_device'] / GIB:.1f}",
        f"{phase}: {largest}",
        f"{found['step_seconds']:.0f}" if found["step_seconds"] else "",
        f"{found['mfu']:.0%}" if found["mfu"] else "",
        f"{found['tokens_per_second']:,.0f}" if found["tokens_per_second"] else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", nargs="*", default=names_in("hardware"))
    parser.add_argument("--methods", nargs="*", default=["grpo", "luffy", "sft_rl", "srft"])
    parser.add_argument("--models", nargs="*", help="by parts of their names; all by default")
    args = parser.parse_args()
    recipes = [
        name
        for name in names_in("recipes")
        if any(name.startswith(f"{method}_") for method in args.methods)
        and (not args.models or any(model in name for model in args.models))
    ]
    print("| recipe | hardware | fits | GiB a device | largest | step, s | MFU | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for hardware in args.hardware:
        for recipe in recipes:
            results[f"{recipe} on {hardware}"] = found = plan(recipe, hardware)
            print(row(recipe, hardware, found), flush=True)
    fit = sum(bool(found.get("fits")) for found in results.values())
    print(json.dumps({"plans": len(results), "fit": fit, "results": results}))


if __name__ == "__main__":
    main()
