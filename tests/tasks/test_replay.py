"""A run whose advantages break: it stops, keeps its state, and shows what was broken."""

import dataclasses
import re

import numpy as np
import pytest
from tiny_runs import metrics_lines, newest_checkpoint, run_in_process, tiny_arguments

import run
from srft_jax.experience import batches
from srft_jax.training.saved_batch import save_batch, saved_batch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Run directory; the first completion of each group has an advantage that is not a number."""
    run_dir, sound = tmp_path_factory.mktemp("broken"), batches.group_advantages

    def poisoned(*arguments, **options):
        own, demonstrations = sound(*arguments, **options)
        return [np.nan, *own[1:]], demonstrations

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "group_advantages", poisoned)
        arguments = ("--training.max_skipped=2", "--training.gradient_norms_every=1")
        assert run_in_process(run_dir, *arguments) == 1
    return run_dir


def replay(run_dir, capsys, *arguments):
    code = run.main(["replay", f"--config={run_dir}/config.yaml", *arguments])
    return code, *capsys.readouterr()


def test_the_run_stops_where_it_started(broken):
    rows = [row for row in metrics_lines(broken) if "loss/total" in row]
    assert [(row["step"], row["loss/skipped"], row["loss/self"]) for row in rows] == [
        (1, 1.0, None),
        (2, 1.0, None),
    ]
    assert rows[0]["loss/demo_nll_gradient_norm"] > 0
    step, arrays, _ = newest_checkpoint(broken)
    assert step == 2 and all(np.isfinite(array).all() for array in arrays.values())
    moments = [array for name, array in arrays.items() if ".mu" in name]
    assert moments and not any(array.any() for array in moments)


def test_replay_shows_the_broken_sequences(broken, capsys):
    code, out, err = replay(broken, capsys)
    assert (code, err) == (0, "")
    assert "the batch of step 2 in stage policy, under the parameters of step 2" in out
    lines = out.splitlines()
    terms = {line.split()[0]: line.split()[1:] for line in lines[4:7]}
    assert terms["self"][0] == "nan" and float(terms["demo_nll"][0]) > 0
    assert float(terms["demo_nll"][1]) > 0
    (title,) = [line for line in lines if "not finite" in line]
    assert title.split()[0] == "4"  # one in each of four groups
    rows = [line.split() for line in lines if " self " in line]
    assert len(rows) == 4 and all(row[1:4] == ["self", "nan", "nan"] for row in rows)
    prompts = [line for line in lines if re.fullmatch(r"[1-4]  \S*\d([-+*]\d)+.*", line)]
    assert len(prompts) == 4


def save_sound(run_dir, **fields):
    """Save the batch again, with other rows; return what was saved before."""
    *whence, batch = saved_batch(str(run_dir))
    rows = dataclasses.replace(batch.rows, **fields)
    save_batch(str(run_dir), *whence, dataclasses.replace(batch, rows=rows))
    return *whence, batch


def test_replay_of_a_sound_batch_shows_the_largest(broken, capsys):
    advantage = saved_batch(str(broken))[-1].rows.advantage
    saved = save_sound(broken, advantage=np.nan_to_num(advantage))
    code, out, _ = replay(broken, capsys)
    save_batch(str(broken), *saved)
    assert code == 0 and "nan" not in out
    assert "sequences is finite; the largest are" in out
    table = out[out.index("min logprob") :].splitlines()[2:7]
    losses = [abs(float(line.split()[3])) for line in table]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0


def test_replay_takes_the_objective_of_the_stage_that_was_skipped(tmp_path, capsys):
    """Plain SFT before ReLIFT has a likelihood of weight 1, ReLIFT's buffered updates half of it.
    A batch of demonstrations could be of either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "mix_weights", lambda objective, step: (np.nan, 1.0))
        arguments = ("--objective.preset=relift", "--objective.sft_steps=2")
        sizes = ("--objective.demo_nll=0.5", "--training.max_skipped=1")
        assert run_in_process(tmp_path, *arguments, *sizes) == 1
    (row,) = [row for row in metrics_lines(tmp_path) if "loss/total" in row]
    save_sound(tmp_path, weight=np.float32(saved_batch(str(tmp_path))[-1].rows.weight != 0))
    code, out, _ = replay(tmp_path, capsys)
    assert code == 0 and "in stage sft" in out
    (term,) = [line.split() for line in out.splitlines() if line.startswith("demo_nll")]
    assert float(term[1]) == pytest.approx(-row["policy/logprob_demo"], rel=1e-3)
    code, _, err = replay(tmp_path, capsys, "--objective.sft_steps=0")
    assert code == 2 and "no stage sft, only policy and buffered" in err


def test_replay_needs_a_saved_batch(tmp_path, capsys):
    assert run.main(["replay", *tiny_arguments(tmp_path)]) == 2
    assert f"{tmp_path} has no saved batch" in capsys.readouterr().err
