"""Verdicts per second, and what hostile answers cost.

    python benchmarks/rewards.py --workers 2 --timeout 2.0

`*_per_second` are over a warm pool: `final_answer` and `math_easy` need no algebra, `math_mixed`
does for every fifth answer, `math_algebra` for each. `hostile` is seconds of a batch with so many
answers that never end, placed where they hurt most, beside the bound of ceil(hostile / workers)
deadlines and a second. Prints one JSON line last.
"""

import argparse
import json
import math
import time

from srft_jax.rewards import RewardPool, RewardRequest

HOSTILE = RewardRequest("math", "<think></think>\\boxed{9^{9^{9^{9}}}}", "7")


def easy(kind: str, number: int) -> RewardRequest:
    return RewardRequest(kind, f"<think>\n1 + 1\n</think>\n{number}", str(number))


def algebra(number: int) -> RewardRequest:
    """Every one another one: nothing is remembered."""
    completion = f"<think></think>So it is $\\boxed{{\\frac{{{number}}}{{7}} + \\sqrt{{x}}}}$."
    return RewardRequest("math", completion, f"$\\sqrt{{x}} + {number}/7$")


def per_second(pool: RewardPool, requests: list[RewardRequest]) -> float:
    start = time.monotonic()
    results = pool.score(requests)
    assert all(result.verdict == "right" for result in results)
    return round(len(requests) / (time.monotonic() - start), 1)


def hostile_batch(pool: RewardPool, args: argparse.Namespace, hostile: int) -> dict[str, float]:
    """All hostile ones first: they go to the same worker, four at a time."""
    requests = [HOSTILE] * hostile + [easy("math", n) for n in range(args.batch - hostile)]
    start = time.monotonic()
    results = pool.score(requests)
    seconds = time.monotonic() - start
    verdicts = [result.verdict for result in results]
    assert verdicts == ["timeout"] * hostile + ["right"] * (args.batch - hostile)
    bound = math.ceil(hostile / args.workers) * args.timeout + 1.0
    return dict(hostile=hostile, seconds=round(seconds, 2), bound=bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--easy", type=int, default=20_000)
    parser.add_argument("--algebra", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hostile", type=int, nargs="*", default=[0, 1, 5, 16])
    args = parser.parse_args()
    values: dict[str, object] = dict(workers=args.workers, timeout=args.timeout)
    start = time.monotonic()
    with RewardPool(args.workers, args.timeout, kinds=["math"]) as pool:
        pool.score([algebra(0)] * args.workers)
        values["seconds_to_first"] = round(time.monotonic() - start, 2)
        sets = {
            "final_answer": [easy("final_answer", n) for n in range(args.easy)],
            "math_easy": [easy("math", n) for n in range(args.easy)],
            "math_mixed": [
                algebra(n) if n % 5 == 0 else easy("math", n) for n in range(args.algebra)
            ],
            "math_algebra": [algebra(-n) for n in range(args.algebra)],
        }
        for name, requests in sets.items():
            values[f"{name}_per_second"] = per_second(pool, requests)
        values["hostile"] = [hostile_batch(pool, args, count) for count in args.hostile]
    print(json.dumps(values))


if __name__ == "__main__":
    main()
