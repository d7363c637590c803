import dataclasses
import re

import pytest
import yaml

from srft_jax import config
from srft_jax.report import page, writers

HOSTILE = '<script>alert("x")</script>'


def sample(step, set_name, prompt, completion, verdict):
    return {
        "step": step,
        "set": set_name,
        "prompt": prompt,
        "completion": completion,
        "answer": "4",
        "reward": float(verdict == "right"),
        "verdict": verdict,
    }


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "my_run"
    with writers.RunWriter(str(run)) as writer:
        for step in (0, 2):
            scores = {"eval/held_out/pass@1": 0.1 + 0.2 * step, "eval/ood/pass@1": 0.3 - 0.1 * step}
            writer.metrics(step, scores)
            writer.samples([sample(step, "rollout", "1+1", "not shown", "right")])
        for step in (1, 2):
            writer.metrics(step, {"rollout/reward": 0.5, "loss/demo_nll": 1.0, "loss/<b>": 2.0})
        writer.samples([sample(0, "held_out", f"{i}+2", f"first {i}", "wrong") for i in range(9)])
        writer.samples([sample(1, "held_out", "0+2", "in between", "crash")])
        writer.samples([sample(2, "held_out", "0+2", f"last {HOSTILE} \ud800", "right")])
        writer.samples([sample(2, "ood", "5+5", "only once", "timeout")])
    resolved = dataclasses.asdict(config.RunConfig(model=config.ModelSection(path="base<i>")))
    (run / "config.yaml").write_text(yaml.safe_dump(resolved))
    return str(run)


def report(run_dir):
    path = page.write_report(run_dir)
    assert path == run_dir + "/report.html"
    with open(path, encoding="utf-8") as file:
        return file.read()


def test_title_headlines_and_config(run_dir):
    html = report(run_dir)
    assert "<h1>srft</h1>" in html and "my_run" in html and "base&lt;i&gt;" in html
    values = re.findall(r'class="value"><span>([\d.%]+) →</span> ([\d.%]+)<', html)
    assert values == [("10.0%", "50.0%"), ("30.0%", "10.0%")]
    assert re.findall(r'<b class="(\w+)">(.+?) points', html) == [
        ("good", "+40.0"),
        ("bad", "-20.0"),
    ]
    assert "learning_rate: 0.001" in html.split("<details")[1]


def test_only_charts_with_data(run_dir):
    titles = re.findall(r'aria-label="(.+?)"', report(run_dir))
    assert titles == ["Rollout reward and accuracy", "Evaluation", "Loss terms"]


def test_every_chart_has_its_metrics(run_dir):
    names = """policy/entropy_self weights/sft rollout/length rollout/truncated loss/gradient_norm
        loss/self_gradient_norm loss/skipped rollout/groups_mixed optimizer/learning_rate
        time/rollout_decode"""
    with writers.RunWriter(run_dir) as writer:
        writer.metrics(2, dict.fromkeys([*names.split(), "perf/tokens_per_second", "time/a"], 1.0))
    charts = re.findall(r"<svg.+?</svg>", report(run_dir), flags=re.DOTALL)
    assert len(charts) == 14
    (losses,) = [chart for chart in charts if "Loss terms" in chart]
    assert "demo_nll" in losses  # what has a chart of its own is not in that of the others
    assert "gradient_norm" not in losses and "skipped" not in losses
    (norms,) = [chart for chart in charts if "Gradient norm" in chart]
    assert ">self" in norms
    assert [chart.count("decode") > 0 for chart in charts if "Time" in chart] == [False, True]


def test_before_and_after(run_dir):
    html = report(run_dir).split('id="samples"')[1]
    articles = html.split("<article")[1:]
    assert len(articles) == 8
    first, ood = articles[:2]  # sets in turn
    assert first.index("first 0") < first.index("last ") and "in between" not in first
    assert re.findall(r'badge (\w+)">(.+?)<', first) == [("bad", "✗ wrong"), ("good", "✓ right")]
    assert re.findall(r'badge (\w+)">(.+?)<', ood) == [("other", "– timeout")]
    assert "not shown" not in html


def test_data_is_escaped(run_dir):
    html = report(run_dir)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "loss/<b>" not in html and "&lt;b&gt;: 2" in html


def test_the_page_needs_nothing_else(run_dir):
    html = report(run_dir)
    assert not re.search(r"https?://|//\w|url\(|@import|\b(src|href)=", html)


def test_a_run_without_metrics(tmp_path):
    with pytest.raises(config.UsageError, match="metrics.jsonl holds no metrics"):
        page.write_report(str(tmp_path))


def test_a_run_without_evaluation_or_samples(run_dir, tmp_path):
    (tmp_path / "my_run" / "samples.jsonl").unlink()
    (tmp_path / "my_run" / "metrics.jsonl").write_text('{"step": 1, "rollout/reward": 1.0}\n')
    html = report(run_dir)
    assert 'id="headlines"' not in html and 'id="samples"' not in html and "<svg" in html


@pytest.mark.parametrize("text", ["{", "just text", "model: {path: a}"])
def test_a_config_that_is_none(run_dir, tmp_path, text):
    (tmp_path / "my_run" / "config.yaml").write_text(text)
    with pytest.raises(config.UsageError, match="not the resolved config"):
        page.write_report(run_dir)
    (tmp_path / "my_run" / "config.yaml").unlink()
    with pytest.raises(config.UsageError, match="config.yaml is missing"):
        page.write_report(run_dir)


def test_a_sample_without_its_fields(run_dir):
    with writers.RunWriter(run_dir) as writer:
        writer.samples([{"step": 3, "set": "ood", "prompt": "1"}])
    with pytest.raises(
        config.UsageError, match=r"step 3 lacks \['answer', 'completion', 'verdict'"
    ):
        page.write_report(run_dir)
