"""The programs that a plan compiles are those of a run, and what decode reads on the way."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_runs import tiny_arguments, tiny_config

from srft_jax.config import parse
from srft_jax.objectives.rows import make_batch
from srft_jax.objectives.schedules import prefix_length
from srft_jax.planning.hlo.count import Count
from srft_jax.planning.planning_tools import lowered_programs
from srft_jax.planning.plans import with_smaller_cache
from srft_jax.planning.program_costs import ProgramCost
from srft_jax.planning.train_program import lowered_train_step
from srft_jax.planning.workload import cache_shape, make_workload, mean_capacity
from srft_jax.rollout.cache import CacheShape
from srft_jax.rollout.request import Request, resolved
from srft_jax.rollout.row_table import RowTable
from srft_jax.rollout.sizes import capacity_for, demand_on, sampler_sizes
from srft_jax.setup.plan_checks import outline_for_plan
from srft_jax.setup.prepare import prepare
from srft_jax.tasks.planned import planned
from srft_jax.training.loading import load_trained
from srft_jax.training.microbatch import FixedParams
from srft_jax.training.state import fresh_state
from srft_jax.training.updates import make_stage_functions, put


def test_the_abstract_train_step_is_the_runs(tmp_path):
    """Not a character differs of the text that JAX hands to XLA, shardings and shapes included."""
    setup = prepare(tiny_config(tmp_path / "run", "--mesh.data=1"))
    stage, training, model = setup.stages.at(1), setup.config.training, setup.model_config
    run = planned(setup)
    with jax.set_mesh(setup.mesh):
        batch = make_batch(
            [],
            setup.objective,
            training,
            num_microbatches=run.num_microbatches(stage),
            length_cap=1,
            on_policy=True,
        )
        step = make_stage_functions(stage, run.forward, run.optimizers["policy"]).train_step
        params = load_trained(setup.config.model, model, setup.mesh, seed=0)
        state = fresh_state(params, model, run.optimizers, setup.mesh)
        real = step.lower(state, put(batch, setup.mesh), FixedParams())
    plan = lowered_train_step(run)
    assert plan.as_text() == real.as_text() and len(plan.as_text()) > 10_000


@pytest.mark.parametrize(
    ("changes", "rows", "capacity"),
    [
        (("rollout.max_new_tokens=8192",), 8, 4528.0),  # all of full length, in turns
        (("rollout.max_new_tokens=8192", "plan.mean_completion=512"), 12, 128.0),  # at once
        (("rollout.max_new_tokens=8192", "plan.mean_completion=512"), 8, 8192.0),  # others wait
    ],
)
def test_decode_reads_the_cache_as_it_grows(changes, rows, capacity, tmp_path):
    """Twelve completions in segments of 256: 0, 256, 512, 768, 1,024, 1,536, 1,536, 2,048, ..."""
    lengths = ("training.row_length=8256", "model.max_positions=16384")
    flags = [f"--{key}" for key in (*changes, *lengths, "rollout.segment=256")]
    config = parse(tiny_arguments(tmp_path, *flags))[1]
    run = planned(outline_for_plan(config, jax.devices()[:1]))
    work = dataclasses.replace(make_workload(run), completions=12)
    shape = CacheShape(rows, 4, 4, 64, 8192, 256)
    assert mean_capacity(run, work, shape) == capacity


@pytest.mark.parametrize("preset", ["grpo", "uft", "prefix_rft"])
def test_the_sampler_of_a_plan_is_that_of_a_run(preset, tmp_path):
    """A prefix is kept behind its prompt, and with `prefix = one` beside the prompt alone."""
    flags = ("--rollout.max_new_tokens=100", "--training.row_length=128", "--rollout.cache_mib=1")
    config = parse(tiny_arguments(tmp_path, f"--objective.preset={preset}", *flags))[1]
    run = planned(outline_for_plan(config, jax.devices()[:1]))
    work = make_workload(run)
    table = RowTable(shards=1)
    rng = mock.Mock(**{"binomial.side_effect": lambda n, _: n, "uniform.side_effect": max})
    size = prefix_length(run.objective, 0, 100, rng) if run.objective.prefix != "none" else 0
    for group in range(4):
        plain = Request([group] * 12, 3, group=group)
        requests = [dataclasses.replace(plain, forced=[1] * size)]
        if run.objective.prefix == "one":
            requests = [
                dataclasses.replace(plain, group_size=2),
                dataclasses.replace(requests[0], group_size=1, first_member=2),
            ]
        table.add([resolved(0, one, run.sampling) for one in requests], np.zeros(2, np.uint32))
    demand, mesh = demand_on(table, run.sampling.slots), run.decode_mesh()
    sizes = sampler_sizes(run.model_config, demand, run.sampling, mesh, 1)
    shape = cache_shape(run, work, 2**20)
    assert (shape.rows, shape.prompts, shape.capacity) == (sizes.rows, sizes.prompts, 128)
    assert shape.prompt_capacity == capacity_for(demand.longest_prompt)
    (prefill,) = (low for name, low in lowered_programs(run, work, shape) if name == "prefill")
    packed = prefill.args_info[0][2]
    assert (packed.forced is not None) == (size > 0)
    assert packed.tokens.shape == (demand.prompts, shape.prompt_capacity)


def test_a_segment_does_not_read_the_cache_that_it_has_no_need_of():
    decode = ProgramCost("decode", *5 * [0.0], Count(1.0, 100.0))
    assert with_smaller_cache(decode, unread=30.0).count == Count(1.0, 70.0)
