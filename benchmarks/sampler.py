"""Tokens per second of the sampler beside the bare weight products that it cannot avoid.

    python benchmarks/sampler.py --batch 16 --prompt 64 --new 192

`sampler_over_bare`: the time of one call, prefill included, over that of a jitted scan with as many
steps of nothing but the model's weight products on [batch, dim] (q, k and v fused, o, gate and up
fused, down, head), timed in between. `--against "--kv 1024"` alternates with a second setting.

Lengths: `equal`; `long-tail`, log-normal limits, which the sampler knows; `stopped`, of which it
knows nothing: each completion has so many stop ids that its expected length is log-normal. The last
two, with `--waves 8`, are also timed as a padded batch: the requests in waves of `--batch`, each
until its longest is done. Prints one JSON line last.
"""

import argparse
import collections
import functools
import json
import shlex
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sizes import add_sizes, model_of

from srft_jax.config import Truncation
from srft_jax.models.decoder import Params, init_params
from srft_jax.rollout import Request, RolloutProgress, SamplingConfig, sample


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(
        temperature=args.temperature,
        truncation=Truncation(top_p=args.top_p),
        max_new_tokens=args.kv - args.prompt,
        slots=args.batch,
        segment=args.segment,
        dtype=args.dtype,
    )


def completion_lengths(args: argparse.Namespace) -> np.ndarray:
    """Return new tokens of each completion; long-tail: log-normal, cut at 16 times the median."""
    count = args.batch * args.waves
    if args.lengths == "equal":
        return np.full(count, args.new)
    drawn = args.new * np.exp(np.random.default_rng(1).normal(size=count))
    return np.clip(drawn, 1, 16 * args.new).astype(int)


def make_requests(args: argparse.Namespace) -> list[Request]:
    """Return requests, with a prompt for every `group` completions.

    Where the lengths of a group differ, each of its completions is a request of its own.

    An untrained model draws nearly evenly, so of V tokens, V / n stop after about n.
    """
    random = np.random.default_rng(0)
    lengths = completion_lengths(args)
    prompts = random.integers(0, args.vocab, (len(lengths) // args.group, args.prompt)).tolist()
    if args.lengths == "equal":
        return [Request(prompt, args.group, max_new_tokens=args.new) for prompt in prompts]
    if args.lengths == "stopped":
        return [
            Request(
                prompts[number // args.group],
                max_new_tokens=16 * args.new,
                stop_ids=range(args.vocab // max(length, 8)),
            )
            for number, length in enumerate(lengths)
        ]
    return [
        Request(prompts[number // args.group], max_new_tokens=int(length))
        for number, length in enumerate(lengths)
    ]


def bare_run(args: argparse.Namespace, params: Params) -> Any:
    """Return a function that runs `--new` steps of weight products and returns their seconds."""
    names = (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))
    layers = [
        [
            jnp.concatenate([params["layers"][n][layer] for n in group], axis=1).astype(args.dtype)
            for group in names
        ]
        for layer in range(args.layers)
    ]
    weights = (layers, params["head"].astype(args.dtype))

    @jax.jit
    def run(weights: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            for query_key_value, output, gate_up, down in weights[0]:
                x = x + (x @ query_key_value)[:, : output.shape[0]] @ output
                x = x + (x @ gate_up)[:, : down.shape[0]] @ down
            return 1e-3 * (x + (x @ weights[1])[:, : x.shape[1]]), None

        return jax.lax.scan(step, x, None, length=args.new)[0]

    x = jnp.ones((args.batch, args.dim), args.dtype)
    return functools.partial(seconds, run, weights, x)


def seconds(run: Any, *inputs: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*inputs))
    return time.perf_counter() - start


class Subject:
    """One setting, to be timed again and again."""

    def __init__(self, args: argparse.Namespace) -> None:
        most = max(args.kv, args.prompt + 16 * args.new)
        self.model = model_of(args, max_positions=most)
        self.params = init_params(self.model, jax.random.key(0))
        self.requests, self.sampling = make_requests(args), sampling_config(args)
        self.batch = args.batch

    def run(self, key: jax.Array) -> RolloutProgress:
        return self._run(self.requests, key)

    def run_padded(self, key: jax.Array) -> float:
        """Return tokens per second in waves of a full batch, each until its slowest ends."""
        waves = range(0, len(self.requests), self.batch)
        seen = [self._run(self.requests[i : i + self.batch], key) for i in waves]
        return sum(p.tokens for p in seen) / sum(p.seconds for p in seen)

    def _run(self, requests: list[Request], key: jax.Array) -> RolloutProgress:
        seen: list[RolloutProgress] = []
        sample(self.params, self.model, requests, key, self.sampling, observer=seen.append)
        return seen[-1]


def measure(args: argparse.Namespace, other: argparse.Namespace | None) -> dict[str, Any]:
    """Return medians over iterations; a ratio is to what was timed just beside it."""
    subject, against = Subject(args), Subject(other) if other else None
    bare = bare_run(args, subject.params)
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, taken, **_: compiled.append(taken) if "backend_compile" in event else None
    )
    figures: dict[str, list[float]] = collections.defaultdict(list)
    for iteration in range(args.iters + 2):
        if iteration == 2:  # two to warm up
            figures.clear()
            compiled.clear()
        key = jax.random.key(iteration)
        bare_step = bare() / args.new
        progress = subject.run(key)
        step = progress.seconds / progress.steps
        figures["tokens_per_s"].append(progress.tokens / progress.seconds)
        figures["ms_per_step"].append(1e3 * step)
        figures["prefill_ms"].append(1e3 * progress.prefill_seconds)
        figures["sampler_over_bare"].append(step / bare_step)
        figures["host_share"].append(progress.host_seconds / progress.seconds)
        if against:
            beside = against.run(key)
            figures["step_over_against"].append(step * beside.steps / beside.seconds)
            figures["prefill_over_against"].append(
                progress.prefill_seconds / beside.prefill_seconds
            )
        if args.lengths != "equal":
            rate = progress.tokens / progress.seconds
            figures["speedup_over_padded"].append(rate / subject.run_padded(key))
            figures["slots_busy"].append(progress.tokens / progress.steps / args.batch)
    return {name: statistics.median(values) for name, values in figures.items()} | {
        "occupancy": progress.occupancy,
        "steps": progress.steps,
        "compilations_after_warm_up": len(compiled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_sizes(parser, batch=16, prompt=64, new=192, kv=256, group=1, waves=1, segment=64, iters=5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--lengths", choices=["equal", "long-tail", "stopped"], default="equal")
    parser.add_argument("--against", help="flags of a second setting, timed alternately with it")
    args = parser.parse_args()
    changes = shlex.split(args.against or "")
    figures = measure(args, parser.parse_args(sys.argv[1:] + changes) if changes else None)
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(vars(args) | {"device": jax.devices()[0].device_kind} | shown))


if __name__ == "__main__":
    main()
