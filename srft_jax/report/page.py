"""One self-contained HTML page about a run, made from its run directory alone."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from markupsafe import Markup

from srft_jax.config import UsageError, read_yaml
from srft_jax.report import figures, template, writers

Lines = list[dict[str, Any]]

_NUM_COMPARISONS = 8
_SAMPLE_FIELDS = {"set", "prompt", "completion", "answer", "verdict"}
_TONES = {
    "right": ("good", "✓"),
    "wrong": ("bad", "✗"),
}  # any other verdict gave no answer to judge


@dataclasses.dataclass(frozen=True)
class _Chart:
    """Metrics that are drawn together.

    Attributes:
        title: Heading of the chart.
        lines: Name of a metric -> label of its line. A `*` in a name stands for any text, in
            metrics that no chart names in full; the same text is the label `*`.
        y_label: Unit or quantity.
        percent: Values are fractions, shown in percent.
    """

    title: str
    lines: dict[str, str]
    y_label: str = ""
    percent: bool = False


_SECTIONS: dict[str, tuple[_Chart, ...]] = {
    "Learning": (
        _Chart(
            "Rollout reward and accuracy",
            {"rollout/reward": "reward", "rollout/accuracy": "accuracy"},
            "mean over completions",
        ),
        _Chart("Evaluation", {"eval/*/pass@1": "*"}, "pass@1", percent=True),
        _Chart(
            "Entropy",
            {"policy/entropy_self": "self", "policy/entropy_demo": "demonstration"},
            "nats per token",
        ),
        # rl weighs the policy's own tokens, sft those of demonstrations: the colours of Entropy.
        _Chart("Entropy-aware weights", {"weights/rl": "rl", "weights/sft": "sft"}, "token mean"),
        _Chart("Loss terms", {"loss/*": "*"}),
        _Chart("Completion length", {"rollout/length": "length"}, "tokens"),
        _Chart(
            "Groups by their completions",
            {
                "rollout/groups_all_right": "all right",
                "rollout/groups_mixed": "mixed",
                "rollout/groups_all_wrong": "all wrong",
            },
            percent=True,
        ),
    ),
    "Diagnostics": (
        _Chart("Truncated completions", {"rollout/truncated": "truncated"}, percent=True),
        _Chart(
            "Gradient norm",
            {"loss/gradient_norm": "gradient norm", "loss/*_gradient_norm": "*"},
            "before clipping",
        ),
        _Chart("Learning rate", {"optimizer/learning_rate": "learning rate"}),
        _Chart("Skipped updates", {"loss/skipped": "skipped"}),
        _Chart(
            "Throughput",
            {"perf/tokens_per_second": "step", "perf/rollout_tokens_per_second": "rollout"},
            "tokens per second",
        ),
        _Chart("Time per step", {"time/*": "*"}, "seconds"),
        _Chart(
            "Time of rollouts",
            {"time/rollout_*": "*", "time/reward_wait": "reward wait"},
            "seconds per step",
        ),
    ),
}


def write_report(run_dir: str) -> str:
    """Write report.html from metrics.jsonl, samples.jsonl and config.yaml, and return its path.

    Raises:
        UsageError: the run has no metrics or no config.yaml, or one of the files is malformed.
    """
    run = epath.Path(run_dir)
    metrics = writers.read_metrics(run_dir)
    if not metrics:
        raise UsageError(f"{run / writers.METRICS} holds no metrics: there is no run to report on")
    config_path = run / "config.yaml"
    if not config_path.exists():
        raise UsageError(f"{config_path} is missing: {run} is not the directory of a run")
    text = config_path.read_text()
    preset, facts = _facts(config_path, text)
    page = template.render(
        style=Markup(figures.STYLE + template.STYLE),
        preset=preset,
        run=run.name,
        facts={**facts, "Run": run.name, "Steps": max(row["step"] for row in metrics)},
        headlines=_headlines(metrics),
        sections=_sections(metrics),
        comparisons=_comparisons(run / writers.SAMPLES, writers.read_samples(run_dir)),
        config=text,
    )
    path = run / "report.html"
    path.write_bytes(page.encode("utf-8", "replace"))  # a completion may hold lone surrogates
    return os.fspath(path)


def _facts(path: epath.Path, text: str) -> tuple[str, dict[str, object]]:
    """The preset, and the facts in the title: name -> value.

    Read as plain YAML: the configuration of an old run need not load as today's `RunConfig`.
    """
    try:
        config = read_yaml(text)
        model = config["model"]
        name = model["path"] or f"random weights, shaped as {model['architecture']}"
        return config["objective"]["preset"], {"Model": name, "Seed": config["seed"]}
    except (UsageError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not the resolved config of a run: {error!r}") from error


def _curve(metrics: Lines, name: str) -> list[figures.Point]:
    return [(row["step"], row[name]) for row in metrics if name in row]


def _matches(names: Iterable[str], pattern: str) -> dict[str, str]:
    """In: [eval/held_out/pass@1], eval/*/pass@1.  Out: {eval/held_out/pass@1: held_out}."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
    matches = ((name, expression.fullmatch(name)) for name in names)
    return {name: match[1] for name, match in matches if match}


def _pattern_of(name: str) -> str | None:
    """The most particular pattern of a chart that a metric fits.

    In: loss/self_gradient_norm.  Out: loss/*_gradient_norm, not loss/*.
    """
    lines = {line for charts in _SECTIONS.values() for chart in charts for line in chart.lines}
    return max(
        (line for line in lines if "*" in line and _matches([name], line)), key=len, default=None
    )


def _sections(metrics: Lines) -> dict[str, list[Markup]]:
    """Every chart that has data, by section."""
    named = {name for charts in _SECTIONS.values() for chart in charts for name in chart.lines}
    unnamed = sorted({name for row in metrics for name in row} - named)
    sections = {
        heading: [drawn for chart in charts if (drawn := _draw(chart, metrics, unnamed))]
        for heading, charts in _SECTIONS.items()
    }
    return {heading: charts for heading, charts in sections.items() if charts}


def _draw(chart: _Chart, metrics: Lines, unnamed: Sequence[str]) -> Markup:
    """The chart as SVG, empty where it has no data; `unnamed` metrics are those for patterns."""
    labels: dict[str, str] = {}
    for name, label in chart.lines.items():
        if "*" in name:
            # A metric goes to its most particular pattern alone.
            fitting = [metric for metric in unnamed if _pattern_of(metric) == name]
            labels |= _matches(fitting, name)
        else:
            labels[name] = label
    series = {label: _curve(metrics, name) for name, label in labels.items()}
    drawn = figures.line_chart(chart.title, series, y_label=chart.y_label, percent=chart.percent)
    return Markup(drawn)  # line_chart escapes


def _headlines(metrics: Lines) -> list[dict[str, Any]]:
    """pass@1 of the first and of the last evaluation, a tile for each set, by name."""
    names = sorted({name for row in metrics for name in row})
    tiles = []
    for name, set_name in _matches(names, "eval/*/pass@1").items():
        curve = _curve(metrics, name)
        (first_step, first), (last_step, last) = curve[0], curve[-1]
        points = 100 * (last - first)
        tiles.append(
            {
                "name": set_name,
                "before": f"{first:.1%}",
                "after": f"{last:.1%}",
                "change": f"{points:+.1f}" if last_step > first_step else None,
                "tone": "good" if points > 0 else "bad" if points < 0 else "",
                "steps": (first_step, last_step),
            }
        )
    return tiles


def _comparisons(path: epath.Path, samples: Lines) -> list[dict[str, Any]]:
    """The earliest and latest completion of the first prompts of each evaluation set, in turn."""
    by_prompt: dict[str, dict[str, Lines]] = {}
    for row in samples:
        if missing := _SAMPLE_FIELDS - row.keys():
            raise UsageError(f"{path}: a row of step {row['step']} lacks {sorted(missing)}")
        if row["set"] != "rollout":
            by_prompt.setdefault(row["set"], {}).setdefault(row["prompt"], []).append(row)
    in_turn = itertools.chain.from_iterable(
        itertools.zip_longest(*(prompts.values() for prompts in by_prompt.values()))
    )
    chosen = [rows for rows in in_turn if rows][:_NUM_COMPARISONS]
    return [_comparison(rows) for rows in chosen]


def _comparison(rows: Lines) -> dict[str, Any]:
    first, last = (pick(rows, key=lambda row: row["step"]) for pick in (min, max))
    shown = [first] if first["step"] == last["step"] else [first, last]
    return {key: first[key] for key in ("set", "prompt", "answer")} | {
        "rows": [
            row
            | dict(zip(("tone", "mark"), _TONES.get(row["verdict"], ("other", "–")), strict=True))
            for row in shown
        ]
    }
