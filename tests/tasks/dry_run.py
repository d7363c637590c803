"""The training loop with everything slow replaced by something cheap that shows what it was given.

Left as they are: data, encoding, requests, advantages, packing, loss terms and their gradients, the
optimizer, the schedule of evaluations and checkpoints, and the records.
"""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tiny_runs import metrics_lines

from srft_jax.batch import TrainState
from srft_jax.evaluation import scores
from srft_jax.models import init_params
from srft_jax.objectives import loss as losses
from srft_jax.ops.head import TokenStats
from srft_jax.rewards import RewardResult
from srft_jax.rollout import Completion
from srft_jax.tasks import generate as generate_module
from srft_jax.tasks import rollouts
from srft_jax.tasks import setup as setup_module
from srft_jax.tasks import train as train_module
from srft_jax.tasks.states import optimizer_of


def dry_run(config):
    """Everything that a run does with its configuration, as one string, and what it prints."""
    trace, out = Trace(), io.StringIO()
    names = "fresh_state Checkpoints make_train_step _put save_hf write_report".split()
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(train_module, name, getattr(trace, name)))
        stack.enter_context(mock.patch.object(setup_module, "RewardPool", trace.RewardPool))
        for module in (rollouts, scores):
            stack.enter_context(mock.patch.object(module, "sample", trace.sample))
        stack.enter_context(contextlib.redirect_stdout(out))
        assert train_module.train(config) == 0
    trace.add("metrics", metrics_lines(config.run_dir))
    trace.add("samples", (Path(config.run_dir) / "samples.jsonl").read_text())
    return "\n".join(trace.lines), out.getvalue().partition("\nstep ")[2]  # config, table cut off


def dry_generate(config):
    trace, out = Trace(), io.StringIO()
    with (
        mock.patch.object(generate_module, "sample", trace.sample),
        mock.patch.object(generate_module, "trained_params", lambda setup: None),
        contextlib.redirect_stdout(out),
    ):
        assert generate_module.generate(config) == 0
    return "\n".join([*trace.lines, out.getvalue()])


def digest(tree):
    """All numbers of a tree that the eye can tell apart."""
    return [np.asarray(x, np.float64).round(9).tolist() for x in jax.tree.leaves(tree)]


class Trace:
    """Stands in for what train.py calls, and writes down the arguments."""

    def __init__(self):
        self.lines = []

    def add(self, what, *values):
        self.lines.append(f"{what} {json.dumps(values, default=str)}")

    def fresh_state(self, setup):
        shapes = jax.eval_shape(lambda: init_params(setup.model_config, jax.random.key(0)))
        params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
        zero = np.float32(0.0)
        optimizer_states = {"policy": optimizer_of(setup).init(params)}
        return TrainState(np.int32(0), params, optimizer_states, zero, zero)

    def Checkpoints(self, run_dir, keep):
        self.add("checkpoints", keep)
        return mock.MagicMock(
            **{
                "__enter__.return_value.newest.return_value": None,
                "__enter__.return_value.save": lambda step, *_: self.add("save", step),
            }
        )

    def RewardPool(self, *args, kinds):
        """Every other completion is right."""
        self.add("pool", *args, kinds)

        def score(requests):
            self.add("score", [(r.kind, r.completion, r.gold) for r in requests])
            verdicts = [RewardResult(1.0, "right"), RewardResult(0.0, "wrong")]
            return [verdicts[i % 2] for i in range(len(requests))]

        return mock.MagicMock(**{"__enter__.return_value.score": score})

    def sample(self, params, model_config, requests, key, sampling):
        """Completions whose lengths and tokens go by their number and the key."""
        self.add("sample", vars(sampling), [vars(r) for r in requests], digest(key_data(key)))
        first = int(key_data(key)[-1]) % 200
        return [
            [self._completion(first, r + g, sampling) for g in range(request.group_size)]
            for r, request in enumerate(requests)
        ]

    def _completion(self, first, number, sampling):
        length = 1 + (5 + number) % sampling.max_new_tokens
        values = np.arange(length, dtype=np.float32)
        tokens = (first + number + np.arange(length)) % 200
        return Completion(tokens, -1.0 - values / 10, 1.0 + values / 10, length > 6)

    def make_train_step(self, model_config, objective, optimizer, **options):
        """Real loss terms on made-up statistics; real updates with their gradients' mean."""
        self.add("train step", model_config, options)

        def train_step(state, batch):
            flat = jax.tree.map(lambda x: x.reshape(-1), batch.rows)
            context = losses.LossContext(
                batch.normalisers,
                state.entropy_self,
                state.entropy_demonstration,
                objective,
                options["on_policy"],
            )
            numbers = jnp.arange(flat.tokens.size)
            stats = TokenStats(-0.5 - (numbers % 7) / 3.0, 0.2 + (numbers % 5) / 4.0)

            def loss(stats):
                terms = losses.loss_terms(stats, flat, context)
                return sum(map(jnp.sum, terms.values())), terms

            (_, terms), slopes = jax.value_and_grad(loss, has_aux=True)(stats)
            self.add("batch", digest(batch))
            self.add("loss", digest(terms), digest(slopes))
            slope = float(jnp.abs(slopes.logprob).max()) + int(state.step)
            grads = jax.tree.map(lambda x: np.full_like(x, 1e-3 * slope**3), state.params)
            moments = state.optimizer_states["policy"]
            updates, moments = optimizer.update(grads, moments, state.params)
            params = jax.tree.map(lambda x, update: x + update, state.params, updates)
            self.add("params", digest(jax.tree.map(lambda x: x.reshape(-1)[0], params)))
            new = TrainState(state.step + 1, params, {"policy": moments}, *np.float32([0.5, 0.7]))
            return new, {f"loss/{name}": jnp.sum(term) for name, term in terms.items()}

        return train_step

    def _put(self, batch, mesh):
        return batch

    def save_hf(self, path, model_config, params, tokenizer):
        self.add("export", model_config)

    def write_report(self, run_dir):
        return "report.html"


def key_data(key):
    return np.asarray(jax.random.key_data(key))
