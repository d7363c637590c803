import json
import math

import pytest
from etils import epath
from etils.epath import testing as epath_testing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srft_jax.config import UsageError
from srft_jax.report import writers


def write_steps(run_dir, steps):
    with writers.RunWriter(str(run_dir)) as writer:
        for step in steps:
            writer.metrics(step, {"rollout/reward": step / 3, "loss/total": -0.1 * step})
            writer.samples([{"step": step, "set": "rollout", "completion": "é\n1"}])


def test_round_trip_keeps_every_digit(tmp_path):
    run_dir = str(tmp_path / "nested" / "run")
    write_steps(run_dir, [1, 2])
    assert writers.read_metrics(run_dir) == [
        {"step": 1, "rollout/reward": 1 / 3, "loss/total": -0.1},
        {"step": 2, "rollout/reward": 2 / 3, "loss/total": -0.2},
    ]
    assert writers.read_samples(run_dir)[1] == {"step": 2, "set": "rollout", "completion": "é\n1"}
    line = (epath.Path(run_dir) / "metrics.jsonl").read_text().splitlines()[0]
    assert line == json.dumps(json.loads(line), sort_keys=True)


def test_a_kill_loses_nothing(tmp_path):
    writer = writers.RunWriter(str(tmp_path))
    writer.metrics(7, {"loss/total": 0.5, "rollout/reward": math.nan})
    writer.samples([{"step": 7}])
    # No close: what follows reads what a killed process has left.
    assert writers.read_metrics(str(tmp_path))[0]["loss/total"] == 0.5
    assert writers.read_samples(str(tmp_path)) == [{"step": 7}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("loss/total")] == [
        (7, 0.5)
    ]
    writer.close()


def test_cut_back_drops_later_lines_only(tmp_path):
    write_steps(tmp_path, [0, 1, 2, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    writers.cut_back(str(tmp_path), 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:4])
    assert [row["step"] for row in writers.read_samples(str(tmp_path))] == [0, 1, 2, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_cut_back_drops_a_torn_last_line(tmp_path):
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss/to')
    with pytest.raises(UsageError, match="line 2"):
        writers.read_metrics(str(tmp_path))
    writers.cut_back(str(tmp_path), 5)
    assert [row["step"] for row in writers.read_metrics(str(tmp_path))] == [1]


def test_an_interrupted_cut_back_leaves_the_file_whole(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writers.cut_back(str(tmp_path), 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_missing_files_are_empty(tmp_path):
    writers.cut_back(str(tmp_path), 3)
    assert writers.read_metrics(str(tmp_path)) == writers.read_samples(str(tmp_path)) == []


@pytest.mark.parametrize(
    "line", ["{", "[1]", "{}", '{"step": 1.5}', '{"step": true}', "", '{"step": 1, "x": "1"}']
)
def test_a_malformed_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UsageError, match="metrics.jsonl, line 2: "):
        writers.read_metrics(str(tmp_path))


def test_object_stores_are_never_opened_for_appending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the mocked gs://bucket is the folder `gs:/bucket` here

    def no_appending(original, path, mode):
        assert "a" not in mode
        return original(path, mode)

    with epath_testing.mock_epath(open=no_appending):
        path = epath.Path("gs://bucket/metrics.jsonl")
        path.parent.mkdir(parents=True)
        writers._append(path, [{"step": 1}])
        writers._append(path, [{"step": 2}])
        assert [row["step"] for row in writers.read_metrics("gs://bucket")] == [1, 2]
