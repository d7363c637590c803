"""The programs that a plan compiles are those of a run."""

import jax
from tiny_runs import tiny_config

from srft_jax.objectives.rows import make_batch
from srft_jax.tasks.planning.train_program import lowered_train_step
from srft_jax.tasks.setup import prepare
from srft_jax.tasks.states import fresh_state
from srft_jax.tasks.updates import make_programs, put


def test_the_abstract_train_step_is_the_runs(tmp_path):
    """Of the text that JAX hands to XLA, shardings and shapes included, not a character differs."""
    setup = prepare(tiny_config(tmp_path / "run", "--mesh.data=1"))
    stage = setup.stage_at(1)
    with jax.set_mesh(setup.mesh):
        batch = make_batch(
            [],
            setup.objective,
            setup.config.training,
            num_microbatches=setup.num_microbatches(stage),
            length_cap=1,
        )
        step = make_programs(setup, stage, {}, None).train_step
        real = step.func.lower(*step.args, fresh_state(setup), put(batch, setup.mesh))
    plan = lowered_train_step(setup.config, setup.model_config, setup.objective, setup.mesh)
    assert plan.as_text() == real.as_text() and len(plan.as_text()) > 10_000
