"""The quickstart itself, shortened: the shipped base model learns to think, and gets better."""

import json

import pytest
from tiny_runs import ROOT


@pytest.mark.slow
def test_the_reward_rises(tmp_path, command):
    run_dir = tmp_path / "run"
    code, out, err = command(
        "train",
        f"--config={ROOT}/configs/quickstart.yaml",
        f"--run_dir={run_dir}",
        "--training.num_steps=40",
        "--data.evaluation.held_out.procedural.count=64",
        "--data.evaluation.ood.procedural.count=32",
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["rollout/reward"] for row in rows if "rollout/reward" in row]
    assert len(rewards) == 40
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    scores = [row["eval/held_out/pass@1"] for row in rows if "eval/held_out/pass@1" in row]
    before, after = scores[0], scores[-1]
    assert 0.15 <= before <= 0.5
    assert after > before + 0.3
    assert (run_dir / "hf" / "model.safetensors").is_file()
    assert "held_out" in out.split("pass@1")[-1]
