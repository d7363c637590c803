"""What a step's metrics become in the files, and what happens to updates that were skipped."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from made_sequences import made_sequence

from srft_jax.batch import Role
from srft_jax.config import ReportConfig, TrainingConfig, UsageError
from srft_jax.experience.batches import Update
from srft_jax.objectives.methods import PRESETS
from srft_jax.objectives.rows import make_batch
from srft_jax.objectives.stages import Stage
from srft_jax.report.records import Diverged, Recorder, StepRecord, offender, over_updates
from srft_jax.report.terminal import ProgressLine
from srft_jax.report.writers import RunWriter, read_metrics
from srft_jax.training.saved_batch import save_batch, saved_batch

SOUND = {"loss/self": 0.5, "loss/total": 0.5, "loss/skipped": 0.0}
BROKEN = {"loss/kl": 0.1, "loss/self": math.nan, "loss/total": math.nan, "loss/skipped": 1.0}

POLICY = Stage("policy", PRESETS["srft"], steps_before=0, sequences_per_update=1, num_updates=1)


@pytest.fixture
def recorder(tmp_path):
    """Stops at the second skipped update in a row; its terminal is `.out`."""
    out = io.StringIO()
    with RunWriter(str(tmp_path)) as writer, ProgressLine(9, out) as progress:
        made = Recorder(
            writer, progress, run_dir=str(tmp_path), max_skipped=2, report=ReportConfig()
        )
        made.out = out
        yield made


def small_batch(token):
    sequence = made_sequence([token], [1, 2], Role.SELF, 0.5, True, [-0.25, -0.5])
    training = TrainingConfig(row_length=4, rows_per_microbatch=1)
    return make_batch([sequence], PRESETS["srft"], training, num_microbatches=2, length_cap=2)


def add(recorder, step, *metrics):
    updates = [Update(POLICY, small_batch(step)) for _ in metrics]
    recorder.add(StepRecord(step, metrics, {}, [], updates))


def test_updates_are_averaged_unless_the_name_says_otherwise():
    first = {"loss/self": 1.0, "policy/ratio_min": 0.9, "policy/ratio_max": 1.5}
    second = {"loss/self": 2.0, "policy/ratio_min": 0.8, "policy/ratio_max": 1.2}
    sampler_metrics = ("policy/sampler_kl", "policy/sampler_max_difference")
    first |= {"loss/skipped": 1.0} | dict.fromkeys(sampler_metrics, 1e-6)
    second |= {"loss/skipped": 1.0} | dict.fromkeys(sampler_metrics, 0.3)
    assert over_updates([first, second | {"weights/sft": 0.4}]) == {
        "loss/self": 1.5,
        "policy/ratio_min": 0.8,
        "policy/ratio_max": 1.5,
        "policy/sampler_kl": 1e-6,
        "policy/sampler_max_difference": 1e-6,
        "loss/skipped": 2.0,
        "weights/sft": 0.4,
    }


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (BROKEN, "loss/self"),
        ({"loss/self": 1.0, "loss/gradient_norm": math.inf, "loss/skipped": 1.0}, "the gradient"),
        ({"buffered/loss/demo_nll": math.inf}, "buffered/loss/demo_nll"),
    ],
)
def test_the_offender_is_named(metrics, expected):
    assert offender(metrics) == expected


def test_a_skipped_update_is_warned_of_and_its_batch_kept(recorder, tmp_path):
    add(recorder, 3, SOUND, BROKEN)
    add(recorder, 4, SOUND, SOUND)
    add(recorder, 5, BROKEN, SOUND)
    path = tmp_path / "replay" / "step_5.npz"
    assert f"WARNING: step 5: loss/self is not finite; its batch is in {path}" in (
        recorder.out.getvalue()
    )
    assert list(path.parent.iterdir()) == [path]  # of step 3 no more
    assert saved_batch(str(tmp_path))[:2] == (5, "policy")


@pytest.mark.parametrize("steps", [[[BROKEN, BROKEN]], [[SOUND, BROKEN], [BROKEN, SOUND]]])
def test_too_many_in_a_row_stop_the_run(recorder, tmp_path, steps):
    *before, last = steps
    for number, updates in enumerate(before, start=1):
        add(recorder, number, *updates)
        recorder.flush()
    with pytest.raises(Diverged) as error:
        add(recorder, len(steps), *last)
    for part in (
        f"step {len(steps)}: loss/self is not finite",
        f"{tmp_path}/replay/step_{len(steps)}.npz",
        "2 times in a row",
        f"python run.py replay --config {tmp_path}/config.yaml",
    ):
        assert part in str(error.value)
    assert [row["step"] for row in read_metrics(str(tmp_path))] == list(range(1, len(steps) + 1))


def test_a_constant_reward_is_warned_of_with_the_verifier_and_a_sample(recorder):
    """The verifier's own: a length may vary all the time."""
    sample = dict(prompt="1+1", answer="2", completion="3", verdict="wrong", kind="math")
    for step in range(1, 21):
        host = {"rollout/reward": step / 10, "rewards/verifier": float(step == 5)}
        recorder.add(StepRecord(step, [], host, [sample], []))
        recorder.flush()
        warned = "WARNING" in recorder.out.getvalue()
        assert warned == (step >= 15)
    text = recorder.out.getvalue()
    assert "since step 6 is 0.0" in text and "verifier math demands" in text and "1+1" in text


def test_the_record_stays_json(recorder, tmp_path):
    add(recorder, 1, BROKEN)
    recorder.flush()

    def refuse(name):
        raise AssertionError(name)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {k: None if v != v else v for k, v in BROKEN.items()} | {"step": 1}
    assert "loss/self" not in read_metrics(str(tmp_path))[0]


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_batch_comes_back_as_it_was(tmp_path, on_policy):
    assert saved_batch(str(tmp_path)) is None
    batch = dataclasses.replace(small_batch(7), on_policy=on_policy)
    save_batch(str(tmp_path), 12, "buffered", batch)
    step, stage, restored = saved_batch(str(tmp_path))
    assert (step, stage) == (12, "buffered")
    assert restored.num_microbatches == batch.num_microbatches
    assert restored.on_policy is on_policy
    for name, array in (vars(batch.rows) | vars(batch.normalisers)).items():
        other = (vars(restored.rows) | vars(restored.normalisers))[name]
        np.testing.assert_array_equal(other, array)
        assert other.dtype == np.asarray(array).dtype


def test_a_saved_batch_that_lacks_something_is_refused(tmp_path):
    """As files are that were written before a batch's stage was."""
    file = save_batch(str(tmp_path), 3, "policy", small_batch(1))
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays.files if name not in ("stage", "on_policy")}
    np.savez(file, **kept)
    with pytest.raises(UsageError, match=r"step_3\.npz has no on_policy, stage: "):
        saved_batch(str(tmp_path))
