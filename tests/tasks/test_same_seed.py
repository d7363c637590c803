"""A seed decides everything but the time it takes."""

import pytest
from tiny_runs import assert_same_run, metrics_lines, run_in_process, samples


def test_the_same_seed_in_two_processes(trained, uninterrupted):
    assert_same_run(trained, uninterrupted)


@pytest.mark.slow
def test_another_seed(tmp_path, uninterrupted):
    assert run_in_process(tmp_path / "run", "--seed=1") == 0
    pairs = zip(metrics_lines(tmp_path / "run"), metrics_lines(uninterrupted), strict=True)
    for row, other in pairs:
        assert row["step"] == other["step"]
        if "loss/total" in row:
            assert row["loss/demo_nll"] != other["loss/demo_nll"]
            assert row["policy/entropy_self"] != other["policy/entropy_self"]
    assert samples(tmp_path / "run") != samples(uninterrupted)
