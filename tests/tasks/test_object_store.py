"""A run directory and data on gs://, whose bucket is a local directory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from bucket import local_buckets
from tiny_runs import NO_PROBLEMS, assert_same_run, run_in_process, tiny_config

import run
from srft_jax.batch import TrainState
from srft_jax.config import parse, to_yaml
from srft_jax.data.sources import load_sets
from srft_jax.report.writers import RunWriter, cut_back, read_metrics
from srft_jax.tasks import train
from srft_jax.training.checkpoint import Checkpoints


@pytest.fixture
def bucket(tmp_path):
    (tmp_path / "store").mkdir()
    with local_buckets(tmp_path / "store") as bucket:
        yield bucket


@pytest.mark.slow
def test_a_run_on_a_bucket_stops_continues_and_exports(
    bucket, tmp_path, monkeypatch, uninterrupted
):
    monkeypatch.chdir(tmp_path)
    collect = train.collect

    def stopped(sampler, scorer, sources, plan, stage, step, *args):
        if step == 4:
            raise KeyboardInterrupt
        return collect(sampler, scorer, sources, plan, stage, step, *args)

    monkeypatch.setattr(train, "collect", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(f"{bucket}/run", "--training.profile_steps=[2]")
    monkeypatch.setattr(train, "collect", collect)
    assert run.main(["train", f"--config={bucket}/run/config.yaml"]) == 0
    assert run.main(["evaluate", f"--config={bucket}/run/config.yaml"]) == 0

    local = tmp_path / "store" / "bucket" / "run"
    assert_same_run(local, uninterrupted)
    for pattern in ("profile/step_2/plugins/profile/*/*.xplane.pb", "tensorboard/events.*"):
        assert list(local.glob(pattern)), pattern
    weights = [path / "hf" / "model.safetensors" for path in (local, uninterrupted)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "</html>" in (local / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]  # nothing beside it


def test_a_configuration_and_data_are_read_from_a_bucket(bucket, tmp_path):
    """Lines, Parquet and patterns."""
    rows = [dict(prompt=f"{n}+1", answer=f"{n + 1}") for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("a", "b"):
        (bucket / "data" / f"{name}.jsonl").write_text(text.replace("+", f"+{name}+"))
    table = pyarrow.Table.from_pylist(rows)
    with (bucket / "data" / "c.parquet").open("wb") as file:
        pyarrow.parquet.write_table(table, file)

    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(tiny_config(tmp_path / "run", *NO_PROBLEMS)))
    (bucket / "config.yaml").write_text(stored.read_text())
    for pattern, count in (("*.jsonl", 8), ("c.parquet", 4), ("", 12)):
        flag = f"--data.train.files={bucket}/data/{pattern}".rstrip("/")
        config = parse([f"--config={bucket}/config.yaml", flag])[1]
        assert len(load_sets(config.data).train) == count, pattern


def test_records_of_a_bucket_are_those_of_a_disk(bucket, tmp_path):
    for run_dir in (f"{bucket}/run", str(tmp_path / "run")):
        for start in (1, 3):  # a run that goes on in another process
            cut_back(run_dir, start - 1)
            with RunWriter(run_dir) as writer:
                for step in range(start, start + 3):
                    writer.metrics(step, {"loss/total": 1.0 / step})
                    writer.samples([{"step": step, "text": "a"}])
    assert [row["step"] for row in read_metrics(f"{bucket}/run")] == [1, 2, 3, 4, 5]
    stored, local = tmp_path / "store" / "bucket" / "run", tmp_path / "run"
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (stored / name).read_bytes() == (local / name).read_bytes()
    sizes = [
        sorted(file.stat().st_size for file in (path / "tensorboard").iterdir())
        for path in (stored, local)
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2


def test_checkpoints_of_a_bucket_are_complete_or_none(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"a": jnp.arange(6.0)}
    state = TrainState(
        jnp.int32(1), params, {"policy": {"m": jnp.ones(3)}}, jnp.ones(()), jnp.ones(())
    )
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpoints(f"{bucket}/run", keep=2) as checkpoints:
        assert checkpoints.newest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, state, {"step": step})
    (bucket / "run/checkpoints/3/commit_success.txt").unlink()  # as a kill would leave it
    with Checkpoints(f"{bucket}/run", keep=2) as checkpoints:
        assert checkpoints.steps() == [2]
        restored, data = checkpoints.restore(2, like)
    assert data == {"step": 2}
    np.testing.assert_array_equal(restored.params["a"], params["a"])
    assert not list(tmp_path.glob("gs:*"))
