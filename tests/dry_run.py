"""The training loop with everything slow replaced by something cheap that shows what it was given.

Left as they are: data, encoding, requests, advantages, packing, loss terms and their gradients, the
optimizer, the schedule of evaluations and checkpoints, and the records.
"""

import contextlib
import dataclasses
import io
import itertools
import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_groups import made_progress
from tiny_runs import metrics_lines

from srft_jax.batch import Role, Trajectory
from srft_jax.config import RunError
from srft_jax.models import init_params, lora
from srft_jax.objectives import loss as losses
from srft_jax.ops.head import ReferencedStats, TokenStats
from srft_jax.rewards import RewardResult
from srft_jax.setup import prepare as setup_module
from srft_jax.setup.prepare import prepare
from srft_jax.tasks import begin as begin_module
from srft_jax.tasks import export as export_module
from srft_jax.tasks import generate as generate_module
from srft_jax.tasks import inspect as inspect_module
from srft_jax.tasks import resume
from srft_jax.tasks import train as train_module
from srft_jax.training import run_export, updates
from srft_jax.training.state import new_state

REPLACED = {
    resume: ["load_trained", "fresh_state"],
    setup_module: ["RewardPool"],
    run_export: ["export_hf"],
    begin_module: ["Sampler", "load_reference"],
    train_module: ["Checkpoints", "write_report"],
    updates: ["make_train_step", "make_gradient_norms", "make_old_logprobs", "put"],
}


def dry_run(config):
    """Everything that a run does with its configuration, as one string, and what it prints."""
    trace = traced_run(config)
    trace.add("metrics", metrics_lines(config.run_dir))
    trace.add("samples", (Path(config.run_dir) / "samples.jsonl").read_text())
    return "\n".join(trace.lines), trace.out.partition("\nstep ")[2]  # config, table cut off


def dry_divergence(config):
    """How a run ends in which no update can be made."""
    trace = Trace(skipped=1.0)
    with pytest.raises(RunError) as caught:
        traced_run(config, trace)
    return str(caught.value), trace.lines[-1]


def traced_run(config, trace=None):
    """What a run has called, and what it has printed."""
    trace, out = trace or Trace(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for module, names in REPLACED.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, getattr(trace, name)))
        stack.enter_context(contextlib.redirect_stdout(out))
        assert train_module.train(config) == 0
    trace.out = out.getvalue()
    return trace


def dry_generate(config):
    trace, out = Trace(), io.StringIO()
    with (
        mock.patch.object(generate_module, "sample", trace.sample),
        mock.patch.object(generate_module, "load_policy", lambda *_: None),
        contextlib.redirect_stdout(out),
    ):
        assert generate_module.generate(config) == 0
    return "\n".join([*trace.lines, out.getvalue()])


def dry_inspect(config):
    """All of it: it needs no model."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert inspect_module.inspect(config) == 0
    return out.getvalue()


def dry_export(config):
    trace, out = Trace(), io.StringIO()
    setup = prepare(config)
    run_export.keep_model_files(setup.config, setup.model_config, setup.tokenizer)
    with (
        mock.patch.object(run_export, "export_hf", trace.export_hf),
        mock.patch.object(export_module, "load_checkpoint", trace.load_checkpoint),
        contextlib.redirect_stdout(out),
    ):
        assert export_module.export(config) == 0
    return trace.lines


def digest(tree):
    """All numbers of a tree that the eye can tell apart."""
    return [np.asarray(x, np.float64).round(9).tolist() for x in jax.tree.leaves(tree)]


class Trace:
    """Stands in for what a run calls, and writes down the arguments.

    Attributes:
        lines: Calls, as text.
        updates: Optimizer's name and batch of each update.
    """

    def __init__(self, skipped=0.0):
        self.lines = []
        self.updates = []
        self.out = ""
        self._skipped = skipped

    def add(self, what, *values):
        self.lines.append(f"{what} {json.dumps(values, default=str)}")

    def load_trained(self, section, model_config, mesh, seed):
        shapes = jax.eval_shape(lambda: init_params(model_config, jax.random.key(0)))
        # Every axis has 4 elements: the optimizer's operations are compiled for each shape.
        params = jax.tree.map(lambda x: np.ones((4,) * x.ndim, np.float32), shapes)
        return lora.trained(params, model_config)

    def fresh_state(self, params, model_config, transformations, mesh):
        return new_state(params, transformations)

    def load_reference(self, section, objective, frozen_params, mesh):
        self.add("reference", objective.uses_reference and (section.reference or section.path))
        return {} if objective.uses_reference else None

    def Checkpoints(self, run_dir, keep):
        self.add("checkpoints", keep)
        return mock.MagicMock(
            **{
                "__enter__.return_value.newest.return_value": None,
                "__enter__.return_value.save": lambda step, *_: self.add("save", step),
            }
        )

    def RewardPool(self, *args, kinds, probes, options):
        """Every other completion is right. They come in order, but how many at a time is chance."""
        self.add("pool", *args, kinds, options)
        results = itertools.cycle([RewardResult(1.0, "right"), RewardResult(0.0, "wrong")])

        def score(requests, cancelled=None):
            for one in requests:
                self.add("score", one.kind, one.completion, one.gold)
            return list(itertools.islice(results, len(requests)))

        return mock.MagicMock(**{"__enter__.return_value.score": score})

    def Sampler(self, model_config, sampling, mesh, tokenizer):
        return DrySampler(self, sampling)

    def sample(self, params, model_config, requests, key, sampling, tokenizer=None):
        sampler = DrySampler(self, sampling)
        sampler.submit(requests, key)
        groups = itertools.groupby(sampler.stream(), lambda one: one.group)
        return [list(group) for _, group in groups]

    def make_train_step(self, options, objective, optimizer, *, optimizer_name):
        """Real loss terms on made-up statistics; real updates with their gradients' mean."""
        name = optimizer_name
        self.add("train step", options, name)  # what the objective does is in the loss

        def train_step(state, batch, fixed):
            first = [np.asarray(leaf)[:1] for leaf in jax.tree.leaves(fixed.frozen)[:1]]
            has_reference = fixed.reference is not None
            self.add("fixed", jax.tree.map(np.shape, fixed.frozen), digest(first), has_reference)
            flat = jax.tree.map(lambda x: x.reshape(-1), batch.rows)
            context = losses.LossContext(
                batch.normalisers,
                state.entropy_self,
                state.entropy_demonstration,
                objective,
                batch.on_policy,
            )
            numbers = jnp.arange(flat.tokens.size)
            stats = TokenStats(-0.5 - (numbers % 7) / 3.0, 0.2 + (numbers % 5) / 4.0)
            if objective.uses_reference:
                stats = ReferencedStats(*stats, stats.logprob - 0.1, stats.entropy / 9)

            def loss(stats):
                terms = losses.loss_terms(stats, flat, context)
                return sum(map(jnp.sum, terms.values())), terms

            (_, terms), slopes = jax.value_and_grad(loss, has_aux=True)(stats)
            self.updates.append((name, batch))
            self.add("batch", name, digest(batch))
            self.add("loss", digest(terms), digest(slopes))
            slope = float(jnp.abs(slopes.logprob).max()) + int(state.step)
            grads = jax.tree.map(lambda x: np.full_like(x, 1e-3 * slope**3), state.params)
            changes, moments = optimizer.update(grads, state.optimizer_states[name], state.params)
            params = jax.tree.map(lambda x, change: x + change, state.params, changes)
            self.add("params", digest(jax.tree.map(lambda x: x.reshape(-1)[0], params)))
            new = dataclasses.replace(
                state,
                step=state.step + 1,
                params=params,
                optimizer_states=state.optimizer_states | {name: moments},
                entropy_self=np.float32(0.5),
                entropy_demonstration=np.float32(0.7),
            )
            metrics = {f"loss/{name}": jnp.sum(term) for name, term in terms.items()}
            return new, metrics | {"loss/skipped": self._skipped}

        return train_step

    def make_gradient_norms(self, *_, **__):
        def gradient_norms(inputs):
            self.add("gradient norms", int(inputs.state.step))
            return {"loss/self_gradient_norm": 1.0}

        return gradient_norms

    def make_old_logprobs(self, options):
        """Others than the sampler's."""
        self.add("old logprobs", options)

        def old_logprobs(params, batch):
            self.add("old logprobs of", digest(params["final_norm"][:1]))
            changed = batch.rows.old_logprobs + 0.05 * (batch.rows.role == Role.SELF)
            rows = dataclasses.replace(batch.rows, old_logprobs=changed)
            return dataclasses.replace(batch, rows=rows)

        return old_logprobs

    def put(self, batch, mesh):
        return batch

    def export_hf(self, path, source, params, lora_config, dtype):
        self.add("export", Path(path).name, json.loads((source / "config.json").read_text()), dtype)

    def load_checkpoint(self, run_dir, section, model_config, mesh, step):
        self.add("restored", step)
        return {}

    def write_report(self, run_dir):
        return "report.html"


class DrySampler:
    """Draws tokens that go by the number of a completion and the key; traces what it is asked."""

    def __init__(self, trace, sampling):
        self._trace, self._sampling = trace, sampling
        self._submitted, self._version = [], 0

    def update(self, params, version=0):
        self._version = version

    def release(self):
        pass

    def submit(self, requests, key, slots=None):
        asked = [vars(request) for request in requests]
        self._trace.add("sample", vars(self._sampling), asked, digest(key_data(key)), slots)
        first = int(key_data(key)[-1]) % 200
        for index, request in enumerate(requests):
            group = index if request.group is None else request.group
            members = range(request.first_member, request.first_member + request.group_size)
            self._submitted += [self._drawn(first, request, group, member) for member in members]

    def stream(self, observer=None):
        submitted, self._submitted = self._submitted, []
        yield from submitted
        if observer is not None:
            observer(made_progress())

    def _drawn(self, first, request, group, member):
        most = request.max_new_tokens or self._sampling.max_new_tokens
        length = 1 + (5 + group + member) % most
        tokens = [*request.forced, *((first + group + member + np.arange(length)) % 200)][:most]
        values = np.arange(len(tokens), dtype=np.float32)
        return Trajectory(
            key="",
            tokens=np.asarray(tokens),
            sampled=values >= len(request.forced),
            logprobs=-1.0 - values / 10,
            entropies=1.0 + values / 10,
            version=self._version,
            finished=length > 6,
            group=group,
            member=member,
        )


def key_data(key):
    return np.asarray(jax.random.key_data(key))
