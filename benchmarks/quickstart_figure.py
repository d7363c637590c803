"""The README's picture, drawn from the runs that benchmarks/quickstart.py --keep leaves.

    python benchmarks/quickstart.py --keep runs/quickstart_table
    python benchmarks/quickstart_figure.py runs/quickstart_table

Reads FOLDER/<method>_<seed>/metrics.jsonl and draws two charts, one line a method: greedy pass@1 on
held-out problems, and the share of a step's sampled completions that are correct. A line is the
mean over the seeds that are there. Prints one JSON line with the last value of every line.
"""

import argparse
import collections
import json
import statistics
from pathlib import Path

from srft_jax.report import figures

ROOT = Path(__file__).parents[1]
# SFT comes last: it has no rollouts, so no line in the second chart, and colours go by place.
LABELS = {
    "srft": "SRFT",
    "grpo": "GRPO",
    "srft_paper": "SRFT, paper",
    "sft_rl": "SFT, then GRPO",
    "sft": "SFT",
}
CHARTS = {
    "eval/held_out/pass@1": "Held-out pass@1, greedy",
    "rollout/accuracy": "Correct completions in a step's rollouts",
}
WIDTH, HEIGHT, GAP = 480, 264, 32  # of one chart, as figures draws it, and between two

# The picture has a background of its own, because a page may be light where the reader's system is
# dark. On a page a chart is as wide as its column; here two stand side by side.
STYLE = f"""{figures.STYLE}
svg {{ --page: #ffffff; }}
@media (prefers-color-scheme: dark) {{ svg {{ --page: #16191d; }} }}
.page {{ fill: var(--page); }}
.chart {{ width: {WIDTH}px; height: {HEIGHT}px; }}
"""


def mean_over_seeds(metric_files: list[Path], metric: str) -> list[figures.Point]:
    """Return (step, mean) for every step at which some run has the metric.

    In: two runs with 0.2 and 0.4 at step 10.  Out: [(10, 0.3)].
    """
    values = collections.defaultdict(list)
    for path in metric_files:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if metric in record:
                values[record["step"]].append(record[metric])
    return [(step, statistics.fmean(values[step])) for step in sorted(values)]


def read_curves(folder: Path) -> dict[str, dict[str, list[figures.Point]]]:
    """Return metric -> label of a method -> points, for the runs in `folder`."""
    runs = {
        label: sorted(folder.glob(f"{method}_[0-9]*/metrics.jsonl"))
        for method, label in LABELS.items()
    }
    return {
        metric: {label: mean_over_seeds(files, metric) for label, files in runs.items() if files}
        for metric in CHARTS
    }


def draw(curves: dict[str, dict[str, list[figures.Point]]]) -> str:
    """Return one SVG file with the charts side by side."""
    charts = [
        figures.line_chart(CHARTS[metric], series, percent=True)
        for metric, series in curves.items()
    ]
    placed = [
        f'<g transform="translate({GAP / 2 + i * (WIDTH + GAP):g} {GAP / 2:g})">\n'
        + chart.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)
        + "\n</g>"
        for i, chart in enumerate(filter(None, charts))
    ]
    width, height = len(placed) * (WIDTH + GAP), HEIGHT + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">',
            f"<style>{STYLE}</style>",
            '<rect class="page" width="100%" height="100%"/>',
            *placed,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds <method>_<seed>/metrics.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quickstart.svg")
    arguments = parser.parse_args()
    curves = read_curves(arguments.folder)
    if not any(points for series in curves.values() for points in series.values()):
        parser.error(f"no <method>_<seed>/metrics.jsonl in {arguments.folder}")
    arguments.out.write_text(draw(curves))
    last = {
        metric: {label: points[-1][1] for label, points in series.items() if points}
        for metric, series in curves.items()
    }
    print(json.dumps({"figure": str(arguments.out), "last": last}))


if __name__ == "__main__":
    main()
