"""Which batches have the trainer's log-probs filled in before the first update of a rollout."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_training import initial_state, split

from srft_jax.config import MeshConfig
from srft_jax.experience.batches import Update
from srft_jax.mesh import make_mesh
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.stages import Stage
from srft_jax.training.microbatch import FixedParams
from srft_jax.training.updates import StageFunctions, apply

FILLED_IN = -3.0


def trained_logprobs(objective, on_policy, has_old_logprobs=True):
    """Old log-probs of the batch that the train step is given."""
    seen = []

    def train_step(state, batch, fixed):
        seen.append(batch)
        return state, {}

    def old_logprobs(params, batch):
        rows = dataclasses.replace(batch.rows, old_logprobs=0 * batch.rows.weight + FILLED_IN)
        return dataclasses.replace(batch, rows=rows)

    stage = Stage("policy", objective, steps_before=0, sequences_per_update=20, num_updates=1)
    functions = StageFunctions(train_step, None, old_logprobs if has_old_logprobs else None)
    update = Update(stage, split("srft", on_policy=on_policy))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    apply(
        {stage: functions},
        initial_state(),
        [update],
        mesh,
        fixed=FixedParams(),
        measure_norms=False,
    )
    return np.asarray(seen[0].rows.old_logprobs), update.batch.rows.old_logprobs


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_batch_that_is_not_on_policy_gets_the_trainers_logprobs(on_policy):
    """The batch decides it: one rollout may be of the current parameters, the next one stale."""
    objective = dataclasses.replace(PRESETS["grpo"], old_logprobs="trainer")
    trained, original = trained_logprobs(objective, on_policy)
    if on_policy:
        np.testing.assert_array_equal(trained, original)
    else:
        assert (trained == FILLED_IN).all() and (original != FILLED_IN).all()


@pytest.mark.parametrize("on_policy", [False, True])
def test_the_samplers_logprobs_stay_where_the_objective_takes_them(on_policy):
    trained, original = trained_logprobs(PRESETS["grpo"], on_policy, has_old_logprobs=False)
    np.testing.assert_array_equal(trained, original)
