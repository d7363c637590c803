"""Time, memory and error of the head beside the naive one that stores all logits.

    python benchmarks/head.py --tokens 4096 --dim 512 --vocab 151936 --logits-mib 64

fwd_ms is `token_stats`; fwdbwd_ms is `token_loss` with the SRFT weights, gradients by hidden states
and head included. `over_bare_matmul` counts the latter in jitted products hidden @ head, timed in
between: a forward and backward pass without any softmax has 3. Prints one JSON line last.
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srft_jax.ops import head_passes
from srft_jax.ops.head import TokenStats, token_loss, token_stats


class Rows(NamedTuple):
    """What `token_loss` and the objective need of a token."""

    targets: jax.Array
    loss_mask: jax.Array
    advantage: jax.Array


def objective(stats: TokenStats, rows: Rows) -> jax.Array:
    """A demonstration's loss in SRFT, of a mean over the tokens."""
    entropy = jax.lax.stop_gradient(stats.entropy)
    p = jnp.exp(stats.logprob)
    loss = -0.5 * jnp.exp(-entropy) * stats.logprob - p / (p + 0.1) * rows.advantage
    return (loss - 0.001 * stats.entropy) / 4096.0


def naive_stats(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> TokenStats:
    """From all logits, as a trainer writes it that has the memory."""
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0]
    return TokenStats(logprob, -jnp.sum(jnp.exp(logp) * logp, axis=1))


def naive_loss(hidden: jax.Array, head: jax.Array, rows: Rows) -> jax.Array:
    return jnp.sum(objective(naive_stats(hidden, head, rows.targets), rows))


def problem(args: argparse.Namespace) -> tuple[jax.Array, jax.Array, Rows]:
    """Hidden states of unit scale and a head that gives logits of about +-4 sigma."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (args.tokens, args.dim)).astype(args.dtype)
    head = jax.random.normal(keys[1], (args.dim, args.vocab)) * 2.0 * args.dim**-0.5
    targets = jax.random.randint(keys[2], (args.tokens,), 0, args.vocab)
    mask = jnp.arange(args.tokens) < round(args.tokens * args.trained)
    advantage = jax.random.normal(keys[3], (args.tokens,))
    return hidden, head.astype(args.dtype), Rows(targets, mask, advantage)


def errors(hidden: jax.Array, head: jax.Array, rows: Rows, stats: TokenStats) -> dict[str, float]:
    """Largest absolute errors of 256 rows against float64, of the inputs as they are rounded."""
    some = np.flatnonzero(np.asarray(rows.loss_mask))[:: max(1, hidden.shape[0] // 256)]
    wide = (np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden[some], head))
    logits = np.matmul(*wide)
    highest = logits.max(axis=1, keepdims=True)
    logp = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
    logprob = logp[np.arange(len(some)), np.asarray(rows.targets)[some]]
    entropy = -(np.exp(logp) * logp).sum(axis=1)
    return {
        "max_logprob_err": float(np.abs(np.asarray(stats.logprob)[some] - logprob).max()),
        "max_entropy_err": float(np.abs(np.asarray(stats.entropy)[some] - entropy).max()),
    }


def seconds(run: Any, *inputs: Any) -> float:
    """One call, its results freed at once."""
    start = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    return time.perf_counter() - start


def measure(args: argparse.Namespace, loss: Any, stats: Any, inputs: Any) -> dict[str, float]:
    """Medians over iterations, a bare product timed between any two."""
    hidden, head, rows = inputs
    bare = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    both = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs).compile()
    forward = jax.jit(stats).lower(hidden, head, rows.targets, rows.loss_mask).compile()
    runs = [(bare, (hidden, head)), (both, inputs)]
    runs.append((forward, (hidden, head, rows.targets, rows.loss_mask)))
    times: list[list[float]] = [[] for _ in runs]
    for iteration in range(args.iters + 1):
        for (run, inputs_of_run), found in zip(runs, times, strict=True):
            taken = seconds(run, *inputs_of_run)
            if iteration:  # the first warms up
                found.append(taken)
    bare_s, both_s, forward_s = map(statistics.median, times)
    ratios = [b / a for a, b in zip(times[0], times[1], strict=True)]
    return {
        "fwd_ms": 1e3 * forward_s,
        "fwdbwd_ms": 1e3 * both_s,
        "bare_matmul_ms": 1e3 * bare_s,
        "over_bare_matmul": statistics.median(ratios),
        "xla_temp_mib": both.memory_analysis().temp_size_in_bytes / 2**20,
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--logits-mib", type=int, default=64, help="budget for tiles of logits")
    parser.add_argument("--route", choices=["auto", "kept", "again"], default="auto", help="logits")
    parser.add_argument("--trained", type=float, default=1.0, help="share of rows not masked")
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    tile_sizes = head_passes.HeadTileSizes()
    if args.route != "auto":
        least = 1 if args.route == "kept" else args.tokens
        tile_sizes = tile_sizes._replace(least_kept_rows=least)
    budget = args.logits_mib * 2**20
    options = head_passes.HeadOptions(None, False, budget, tile_sizes=tile_sizes)
    layout = head_passes.make_layout(args.tokens, args.vocab, 1, options)
    if args.route != "auto" and layout.keep != (args.route == "kept"):
        parser.error(f"--logits-mib {args.logits_mib} has no route {args.route!r}: {layout}")
    inputs = problem(args)
    memory = {"logits_bytes": budget, "tile_sizes": tile_sizes}

    def stats(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
        return token_stats(hidden, head, targets, mask=mask, **memory)

    def loss(hidden: jax.Array, head: jax.Array, rows: Rows) -> jax.Array:
        return token_loss(hidden, head, rows, objective, **memory)[0]

    found = measure(args, loss, stats, inputs)
    hidden, head, rows = inputs
    found |= errors(hidden, head, rows, jax.jit(stats)(hidden, head, rows.targets, rows.loss_mask))
    if args.naive:
        naive = functools.partial(lambda a, b, targets, _: naive_stats(a, b, targets))
        of_naive = measure(args, naive_loss, naive, inputs)
        of_naive |= errors(hidden, head, rows, jax.jit(naive_stats)(hidden, head, rows.targets))
        found |= {f"naive_{name}": value for name, value in of_naive.items()}
    device = jax.devices()[0]
    cut = {"tile_rows": layout.rows, "tile_columns": layout.columns, "kept": layout.keep}
    print(json.dumps(rounded(vars(args) | {"device": device.device_kind} | cut | found)))


if __name__ == "__main__":
    main()
