"""Line charts as inline SVG, for a page that opens offline and runs no script.

Colours are CSS variables, so one drawing serves light and dark; a page that shows charts includes
`STYLE` once.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float]
Series = Mapping[str, Sequence[Point]]

_WIDTH, _HEIGHT = 480.0, 264.0  # user units; the page scales the drawing to its column
_TOP, _BOTTOM, _LEFT, _RIGHT = 52.0, 37.0, 44.0, 14.0
_CHARACTER = 7.2  # advance of a letter of a wide 12-unit sans-serif
_LABEL_GAP = 15.0
_SMOOTH_ABOVE = 40  # points
_MAX_DRAWN, _MAX_HOVER = 600, 120  # more points than pixels only make the file large

# After Okabe and Ito (2008), in steps with 3:1 contrast to each background. Dashes tell further
# series apart.
_PALETTE = {
    "light": ("#0072b2", "#d55e00", "#00866a", "#b0568f", "#8a6d00", "#5a5fc8"),
    "dark": ("#56b4e9", "#f08a3c", "#2fc59a", "#e39cc6", "#dcc04a", "#a3a7f7"),
}


def _variables(mode: str, **others: str) -> str:
    colours = {f"series-{i}": colour for i, colour in enumerate(_PALETTE[mode])} | others
    return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"


STYLE = f"""
{_variables("light", ink="#1c2126", muted="#646c75", grid="#e6e8eb", hover="#1c212614")}
@media (prefers-color-scheme: dark) {{
{_variables("dark", ink="#e6e9ec", muted="#98a1ab", grid="#2e343b", hover="#ffffff1a")}
}}
.chart {{ display: block; width: 100%; height: auto; overflow: visible;
  font: 12px system-ui, sans-serif; }}
.chart text {{ fill: var(--muted); font-variant-numeric: tabular-nums; }}
.chart .title {{ fill: var(--ink); font-size: 14.5px; font-weight: 600; }}
.chart .label {{ fill: var(--ink); }}
.chart .grid {{ stroke: var(--grid); }}
.chart .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }}
.chart .raw {{ stroke-width: 1; opacity: 0.38; }}
.chart .band {{ fill: transparent; }}
.chart .band:hover {{ fill: var(--hover); }}
@media (max-width: 480px) {{ .chart {{ font-size: 14px; }} .chart .title {{ font-size: 17px; }} }}
"""


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Maps values from `low` to `high` onto user units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(title: str, series: Series, *, y_label: str = "", percent: bool = False) -> str:
    """Draw lines over steps, one for each series, labelled at their ends.

    More than 40 points are drawn thin, with their centred mean over them. Pointing at a step shows
    its values.

    Args:
        series: Name to (step, value) points in the order of steps; values that are not finite are
            left out.
        y_label: Unit or quantity, under the title.
        percent: Values are fractions, shown in percent.

    Returns:
        One <svg> element, well-formed XML; "" if no series has a finite point.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()
    }
    drawn = {name: points for name, points in finite.items() if points}
    if not drawn:
        return ""
    x_axis, y_axis = _axes(drawn)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{html.escape(title)}">',
        _text(0, 16, title, "title"),
        _text(0, 34, y_label) if y_label else "",
        _grid(x_axis, y_axis, percent),
        *(
            _line(points, index, x_axis, y_axis)
            for index, points in reversed(list(enumerate(drawn.values())))
        ),
        _end_labels(drawn, x_axis, y_axis) if len(drawn) > 1 else "",
        _hover(drawn, x_axis, percent),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Return multiples of 1, 2, 2.5 or 5 times a power of ten that enclose `low` < `high`.

    In: 0.3, 4.2, about 4 steps.  Out: 0, 1, 2, 3, 4, 5.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def smooth(points: Sequence[Point], half: int) -> list[Point]:
    """Return the mean of each value with `half` values before and after it, fewer at the ends."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    count = len(points)
    windows = [(max(0, i - half), min(count, i + half + 1)) for i in range(count)]
    return [
        (x, (sums[stop] - sums[start]) / (stop - start))
        for (x, _), (start, stop) in zip(points, windows, strict=True)
    ]


def _axes(series: Series) -> tuple[_Axis, _Axis]:
    """The step axis ends with the data, the value axis at ticks, with zero unless that is far."""
    points = list(itertools.chain.from_iterable(series.values()))
    x_low, x_high = _widened(min(x for x, _ in points), max(x for x, _ in points))
    low, high = min(y for _, y in points), max(y for _, y in points)
    if 0 < low < 0.6 * high:
        low = 0.0
    longest = max(map(len, series)) if len(series) > 1 else 0
    right = _WIDTH - _RIGHT - (_CHARACTER * longest + 8 if longest else 0)
    steps = tuple(x for x in nice_ticks(x_low, x_high) if x_low <= x <= x_high and x == round(x))
    values = nice_ticks(*_widened(low, high), count=4)
    return (
        _Axis(x_low, x_high, _LEFT, right, steps),
        _Axis(values[0], values[-1], _HEIGHT - _BOTTOM, _TOP, values),
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    """The same bounds, or some space around a single value."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (low - 0.5 * abs(low), low + 0.5 * abs(low)) if low else (0.0, 1.0)


def _grid(x_axis: _Axis, y_axis: _Axis, percent: bool) -> str:
    lines = []
    for value in y_axis.ticks:
        y = y_axis.at(value)
        lines.append(
            f'<line class="grid" x1="{x_axis.start:.1f}" x2="{x_axis.end:.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        lines.append(_text(x_axis.start - 8, y + 4, _number(value, percent), anchor="end"))
    for step in x_axis.ticks:
        lines.append(_text(x_axis.at(step), _HEIGHT - 19, _number(step), anchor="middle"))
    lines.append(_text((x_axis.start + x_axis.end) / 2, _HEIGHT - 5, "step", anchor="middle"))
    return "\n".join(lines)


def _line(points: Sequence[Point], index: int, x_axis: _Axis, y_axis: _Axis) -> str:
    def path(values: Sequence[Point], kind: str) -> str:
        places = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in _thinned(values))
        return f'<polyline class="{kind}" {_stroke(index)} points="{places}"/>'

    if len(points) > _SMOOTH_ABOVE:
        return path(points, "line raw") + path(smooth(points, len(points) // 30 + 1), "line")
    dots = [
        f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3" fill="{_colour(index)}"/>'
        for x, y in points
    ]
    return path(points, "line") + "".join(dots)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Lowest and highest point of each of a few hundred stretches, so that no spike is lost."""
    if len(points) <= _MAX_DRAWN:
        return list(points)
    size = math.ceil(2 * len(points) / _MAX_DRAWN)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    extremes = [{min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])} for s in stretches]
    return [point for pair in extremes for point in sorted(pair)]


def _end_labels(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    """The legend: each name beside the end of its line, moved apart where lines end together."""
    ends = sorted((y_axis.at(points[-1][1]), i) for i, points in enumerate(series.values()))
    names, parts, above = list(series), [], -math.inf
    # From the top down: y grows downwards.
    for place, (line_end, index) in enumerate(ends):
        # Room must be left below for the labels that follow.
        lowest = y_axis.start - _LABEL_GAP * (len(ends) - 1 - place)
        above = min(max(line_end, above + _LABEL_GAP), lowest)
        x = x_axis.end + 6
        parts.append(
            f'<line class="line" {_stroke(index)} x1="{x:.1f}" x2="{x + 8:.1f}" '
            f'y1="{above:.1f}" y2="{above:.1f}"/>'
        )
        parts.append(_text(x + 13, above + 4, names[index], "label"))
    return "\n".join(parts)


def _hover(series: Series, x_axis: _Axis, percent: bool) -> str:
    """One invisible band a step, with the values there as its tooltip."""
    values: dict[float, list[str]] = {}
    for name, points in series.items():
        for x, y in points:
            values.setdefault(x, []).append(f"{name}: {_number(y, percent, digits=4)}")
    steps = sorted(values)
    steps = steps[:: math.ceil(len(steps) / _MAX_HOVER)]
    edges = [x_axis.at((a + b) / 2) for a, b in itertools.pairwise(steps)]
    bounds = itertools.pairwise([x_axis.start, *edges, x_axis.end])
    return "\n".join(
        f'<rect class="band" x="{left:.1f}" y="{_TOP:g}" width="{right - left:.1f}" '
        f'height="{_HEIGHT - _BOTTOM - _TOP:g}">'
        f"<title>{html.escape(chr(10).join([f'step {step:g}', *values[step]]))}</title></rect>"
        for step, (left, right) in zip(steps, bounds, strict=True)
    )


def _colour(index: int) -> str:
    return f"var(--series-{index % len(_PALETTE['light'])})"


def _stroke(index: int) -> str:
    dashes = "" if index < len(_PALETTE["light"]) else ' stroke-dasharray="5 4"'
    return f'stroke="{_colour(index)}"{dashes}'


def _text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(content)}</text>"
    )


def _number(value: float, percent: bool = False, digits: int = 6) -> str:
    """In: 0.25, percent.  Out: 25%.  In: 12500.  Out: 12.5k."""
    if percent:
        return f"{100 * value:.{digits}g}%"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"
