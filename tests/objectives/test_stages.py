"""Which stages a run has, which of them a step is in, and how large their updates are."""

import dataclasses

import pytest

from srft_jax.config import TrainingConfig
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.stages import make_stages

SIZES = dict(num_steps=10, prompts_per_step=8, updates_per_rollout=2, completions_per_prompt=4)


def stages_of(preset, **changes):
    return make_stages(dataclasses.replace(PRESETS[preset], **changes), **SIZES)


@pytest.mark.parametrize(
    ("preset", "sequences"),
    [
        ("srft", 4 * (4 + 1)),  # completions and the demonstration of each prompt
        ("grpo", 4 * 4),
        ("sft", 4),
        ("hpt", 4 * 4),  # completions or the demonstration
        ("chord", 4 * 4 + 16),  # and half of 32 demonstrations of other prompts
        ("relift", 4 * 4),  # demonstrations wait in the buffer
    ],
)
def test_sequences_of_an_update(preset, sequences):
    assert stages_of(preset).policy.sequences_per_update == sequences


def test_plain_sft_comes_first():
    stages = stages_of("sft_rl", sft_steps=3)
    assert [stages.at(step).name for step in (1, 3, 4, 5)] == ["sft", "sft", "policy", "policy"]
    assert [stage.name for stage in stages.all] == ["sft", "policy"]
    assert stages.sft.objective == PRESETS["sft"] and stages.sft.sequences_per_update == 4
    assert [stages.sft.stage_step(1), stages.policy.stage_step(4)] == [0, 0]
    assert [stage.optimizer for stage in stages.all] == ["demonstration", "policy"]
    assert [stage.num_updates for stage in stages.all] == [3 * 2, 7 * 2]


def test_one_stage_has_every_step():
    stages = stages_of("srft")
    assert stages.all == [stages.policy] == [stages.at(1)] and stages.policy.stage_step(1) == 0


def test_buffered_demonstrations_are_a_stage_that_no_step_is_in():
    stages = stages_of("relift", demo_nll=0.5)
    assert stages.all == [stages.policy, stages.buffered] and stages.at(1) == stages.policy
    assert stages.buffered.objective == dataclasses.replace(PRESETS["sft"], demo_nll=0.5)
    assert stages.buffered.sequences_per_update == 128
    assert stages.buffered.optimizer == "demonstration" and stages.buffered.label == "buffered/"


def test_microbatches_hold_any_update():
    """Two sequences of 60 in a row of 128, four rows in a microbatch."""
    training = TrainingConfig(row_length=128, rows_per_microbatch=4)
    assert stages_of("grpo").policy.num_microbatches(60, training) == 2
    assert stages_of("srft").policy.num_microbatches(60, training) == 3
