"""Stages and buffered steps, in the loop: which optimizer makes which update, at which rate."""

import dataclasses

import jax
import numpy as np
import pytest
from dry_run import traced_run
from tiny_runs import metrics_lines, tiny_config

from srft_jax.batch import Role

RATES = (
    "--training.optimizer.learning_rate=0.5",
    "--training.optimizer.warmup_steps=2",
    "--training.optimizer.schedule=constant",
    "--training.demonstration_optimizer.learning_rate=0.3",
    "--training.demonstration_optimizer.warmup_steps=3",
)


@pytest.fixture
def run(tmp_path):
    """The trace of a run of this preset, and its steps' metrics."""

    def run(preset, *flags):
        path = tmp_path / preset
        config = tiny_config(path, f"--objective.preset={preset}", *RATES, *flags)
        trace = traced_run(config)
        return trace, [row for row in metrics_lines(path) if "optimizer/updates" in row]

    return run


def roles(batch):
    return set(np.unique(batch.rows.role[batch.rows.loss_mask]).tolist())


@pytest.mark.slow
def test_two_stages(run):
    """Schedules count their own updates, moments are fresh; only the second stage samples."""
    trace, steps = run("sft_rl", "--objective.sft_steps=2", "--training.num_steps=4")
    assert [name for name, _ in trace.updates] == ["demonstration"] * 2 + ["policy"] * 2
    only = [{Role.DEMONSTRATION}] * 2 + [{Role.SELF}] * 2
    assert [roles(batch) for _, batch in trace.updates] == only
    rates = [step["optimizer/learning_rate"] for step in steps]
    assert rates == pytest.approx([0.1, 0.2, 0.25, 0.5])
    assert ["rollout/reward" in step for step in steps] == [False, False, True, True]


def test_updates_of_a_rollout_share_a_rate_schedule(run):
    """Two updates a step: the rates are those of each step's first."""
    flags = (
        "--objective.sft_steps=1",
        "--training.num_steps=3",
        "--training.updates_per_rollout=2",
    )
    trace, steps = run("sft_rl", *flags)
    assert [step["optimizer/updates"] for step in steps] == [2, 2, 2]
    assert [name for name, _ in trace.updates] == ["demonstration"] * 2 + ["policy"] * 4
    rates = [step["optimizer/learning_rate"] for step in steps]
    assert rates == pytest.approx([0.1, 0.25, 0.5])


def test_the_first_stage_is_plain_sft(run):
    first, _ = run("sft_rl", "--objective.sft_steps=2", "--training.num_steps=3")
    plain, _ = run("sft", "--training.num_steps=2")
    for (_, batch), (_, other) in zip(first.updates[:2], plain.updates, strict=True):
        batch = dataclasses.replace(
            batch, rows=dataclasses.replace(batch.rows, correct=other.rows.correct)
        )  # which only what has rollouts knows of a demonstration
        for array, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_buffered_demonstrations_have_a_step_of_their_own(run):
    """Half of the prompts have one, no gate: two or so a step, trained on by threes."""
    flags = ("--objective.demo_buffer=3", "--objective.gate=none", "--training.num_steps=4")
    trace, steps = run("relift", *flags)
    names = [name for name, _ in trace.updates]
    assert names.count("policy") == 4 and names.count("demonstration") >= 2
    for name, batch in trace.updates:
        assert roles(batch) == {Role.SELF if name == "policy" else Role.DEMONSTRATION}
    buffered = [step for step in steps if "buffered/loss/demo_nll" in step]
    rates = [step["buffered/optimizer/learning_rate"] for step in buffered]
    assert rates[:2] == pytest.approx([0.1, 0.2])
    assert [step["optimizer/updates"] > 1 for step in steps] == [step in buffered for step in steps]
    assert all(step["optimizer/learning_rate"] > 0 for step in steps)


def test_a_step_without_anything_to_learn_makes_no_update(run):
    """Groups of one completion have one reward, which all of them are equal to."""
    flags = ("--rollout.completions_per_prompt=1", "--training.num_steps=3")
    trace, steps = run("dr_grpo", "--objective.drop_zero_std=true", *flags)
    assert trace.updates == []
    assert [step["optimizer/updates"] for step in steps] == [0, 0, 0]
    assert [step["rollout/groups_dropped"] for step in steps] == [4, 4, 4]
    assert not any(name.startswith("loss/") for step in steps for name in step)


def test_the_mix_is_logged(run):
    _, steps = run("chord", "--objective.demo_per_step=3", "--objective.mix_steps=2")
    assert [step["objective/mix"] for step in steps[:3]] == pytest.approx([0.9, 0.475, 0.05])


@pytest.mark.parametrize(("updates", "calls"), [(1, 0), (2, 2)])
def test_the_trainer_computes_old_logprobs_where_there_are_several_updates(run, updates, calls):
    """It does so for both batches before the first update: under the same parameters."""
    flags = ("--objective.old_logprobs=trainer", f"--training.updates_per_rollout={updates}")
    trace, _ = run("grpo", "--training.num_steps=1", *flags)
    made = [line for line in trace.lines if line.startswith("old logprobs of")]
    assert len(made) == calls and len(set(made)) <= 1


def test_gradient_norms_are_taken_before_every_second_step(run):
    flags = ("--training.gradient_norms_every=2", "--training.num_steps=4")
    trace, steps = run("srft", *flags)
    made = [line for line in trace.lines if line.startswith("gradient norms")]
    assert made == ["gradient norms [1]", "gradient norms [3]"]
    measured = ["loss/self_gradient_norm" in step for step in steps]
    assert measured == [False, True, False, True]


SUMMARIES = {
    "srft": ["demonstrations per prompt 1 where there is one", "tokens per step, at most 432"],
    "grpo": ["demonstrations per prompt 0", "tokens per step, at most 324"],
    "dapo": ["completions per step 12", "with refills, at most 48"],
    "chord": ["demonstrations per step 3", "tokens per step, at most 405"],
    "hpt": ["1 where there is one and at most 0 completions are correct"],
    "relift": ["policy 2 steps", "buffered demonstrations an update on 5 tokens per update"],
    "sft_rl": [
        "first stage 1 steps, each prompt with its demonstration tokens per step, at most 108",
        "policy 1 steps tokens per step, at most 324",
    ],
    "prefix_rft": ["that start with a part of it 1 where there is a demonstration"],
}


@pytest.mark.parametrize("preset", SUMMARIES)
def test_the_batch_arithmetic_is_that_of_the_method(preset, run):
    own = {"chord": "demo_per_step=3", "relift": "demo_buffer=5", "sft_rl": "sft_steps=1"}
    flags = [f"--objective.{own[preset]}"] if preset in own else []
    trace, _ = run(preset, *flags, "--training.num_steps=2")
    said = " ".join(trace.out.split())
    for text in SUMMARIES[preset]:
        assert text in said
