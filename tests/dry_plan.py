"""The verb `plan` with nothing compiled: which train steps it asks for, and what it prints."""

import contextlib
import io
import itertools

import jax

from srft_jax.planning.chips import CHIPS
from srft_jax.planning.hlo.count import Count
from srft_jax.planning.planning_tools import PlanningTools
from srft_jax.planning.program_costs import OutOfMemory, ProgramCost
from srft_jax.planning.topology import Topology, parse_topology
from srft_jax.tasks import plan as verb


def fake_topology(name, slices=1):
    """A topology of this name whose only device is this machine's."""
    kind, sizes = parse_topology(name)
    return Topology(name, CHIPS[kind], sizes, tuple(jax.devices()[:1]), slices)


def dry_plan(config, fits=lambda run: True, flops=1e9, **arguments):
    """Return (run, workload) of each train step that is asked for, and all that is printed."""
    asked = []

    def train_cost(run, work):
        asked.append((run, work))
        if not fits(run):
            return OutOfMemory("train", None, ())
        return ProgramCost("train", 0.0, 1e6, 0.0, 1e6, 0.0, Count(flops, 1e6))

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        tools = PlanningTools(
            prepare_backend=lambda name: None,
            find_topology=fake_topology,
            train_cost=train_cost,
            sampler_costs=lambda *_: [],
            clock=itertools.count(0, 100).__next__,  # each look is 100 s later
            **arguments,
        )
        verb.plan(config, tools)
    return asked, out.getvalue()
