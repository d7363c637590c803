"""The verb `plan` with nothing compiled: which programs it asks for, and what it prints."""

import contextlib
import io
import itertools
from unittest import mock

import jax

from srft_jax.planning import plans, scaling, search
from srft_jax.planning.chips import CHIPS
from srft_jax.planning.hlo.count import Count
from srft_jax.planning.program_costs import OutOfMemory, ProgramCost
from srft_jax.planning.topology import Topology, split_name
from srft_jax.tasks import plan as verb


def fake_topology(name, slices=1):
    kind, sizes = split_name(name)
    return Topology(name, CHIPS[kind], sizes, tuple(jax.devices()[:1]))


def dry_plan(config, fits=lambda run: True, flops=1e9):
    """Runs whose train step is compiled, and all that is printed."""
    asked = []

    def train_account(run, work):
        asked.append((run.config.model.remat, run.config.training, run.model_config, work))
        if not fits(run):
            return OutOfMemory("train", None, ())
        return ProgramCost("train", 0.0, 1e6, 0.0, 1e6, 0.0, Count(flops, 1e6))

    patches = [
        mock.patch.object(verb, "prepare_backend"),
        mock.patch.object(verb, "topology_of", fake_topology),
        mock.patch.object(scaling, "topology_of", fake_topology),
        mock.patch.object(plans, "train_account", train_account),
        mock.patch.object(search, "train_account", train_account),
        mock.patch.object(plans, "_with_rollouts", lambda plan, *_: plan),
        mock.patch.object(search.time, "monotonic", itertools.count(0, 100).__next__),
    ]
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stdout(out))
        verb.plan(config)
    return asked, out.getvalue()
