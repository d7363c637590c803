"""How full rows are packed, and how long it takes the host.

    python benchmarks/packing.py [--sequences 1024] [--row_length 9216] [--mean 1700] ...

Lengths have a long tail: prompts around 200 tokens, completions log-normal and capped; one in eight
is a demonstration, longer than what the policy samples. Prints a table, then one JSON line.
"""

import argparse
import json
import time

import numpy as np

from srft_jax.objectives.rows import pack


def draw_lengths(arguments: argparse.Namespace, seed: int) -> list[int]:
    """Inputs of each sequence: the last token is a target only."""
    random = np.random.default_rng(seed)
    number = arguments.sequences
    prompts = np.clip(random.lognormal(np.log(200), 0.5, number), 20, 1024)
    demonstrated = np.arange(number) % 8 == 7
    # A log-normal's mean is exp(mu + sigma^2 / 2).
    mean = np.where(demonstrated, arguments.demonstration_mean, arguments.mean)
    answers = random.lognormal(np.log(mean) - arguments.sigma**2 / 2, arguments.sigma)
    return (prompts + np.clip(answers, 1, arguments.max_new_tokens)).astype(int).tolist()


def first_fit(lengths: list[int], row_length: int) -> int:
    """Rows of first-fit decreasing, the textbook's, to compare with."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        row = next((number for number, room in enumerate(free) if room >= length), len(free))
        if row == len(free):
            free.append(row_length)
        free[row] -= length
    return len(free)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Means over the batches."""
    fills, computed, naive, padded, milliseconds = [], [], [], [], []
    for seed in range(arguments.batches):
        lengths = draw_lengths(arguments, seed)
        began = time.perf_counter()
        rows = len(pack(lengths, arguments.row_length))
        milliseconds.append(1e3 * (time.perf_counter() - began))
        fills.append(sum(lengths) / (rows * arguments.row_length))
        whole = -(-rows // arguments.rows_per_microbatch) * arguments.rows_per_microbatch
        computed.append(sum(lengths) / (whole * arguments.row_length))
        rows_of_first_fit = first_fit(lengths, arguments.row_length)
        naive.append(sum(lengths) / (rows_of_first_fit * arguments.row_length))
        padded.append(sum(lengths) / (len(lengths) * max(lengths)))
    return {
        "fill": float(np.mean(fills)),
        "fill_min": min(fills),
        "fill_of_microbatches": float(np.mean(computed)),
        "fill_first_fit": float(np.mean(naive)),
        "fill_padded_to_longest": float(np.mean(padded)),
        "pack_ms": float(np.median(milliseconds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--row_length", type=int, default=9216)
    parser.add_argument("--rows_per_microbatch", type=int, default=8)
    parser.add_argument("--mean", type=float, default=1700, help="of sampled completions, tokens")
    parser.add_argument("--demonstration_mean", type=float, default=4000)
    parser.add_argument("--sigma", type=float, default=0.9)
    parser.add_argument("--max_new_tokens", type=int, default=8192)
    parser.add_argument("--batches", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments)
    for name, value in result.items():
        print(f"{name:24} {value:8.2f}" if name.endswith("_ms") else f"{name:24} {value:8.1%}")
    print(json.dumps(vars(arguments) | result))


if __name__ == "__main__":
    main()
