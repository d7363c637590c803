import math
from xml.etree import ElementTree

import pytest

from srft_jax.report import figures


def parsed(series, **options):
    return ElementTree.fromstring(figures.line_chart("A <b> & c", series, **options))


def places(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def test_a_chart_is_well_formed_and_escaped():
    chart = parsed({"x<y>": [(0, 1), (1, 2)], '"&"': [(0, 3)]}, y_label="<i>")
    texts = [element.text for element in chart.iter("text")]
    assert texts[:2] == ["A <b> & c", "<i>"]
    assert {"x<y>", '"&"'} <= set(texts)


def test_lines_rise_with_values_and_stay_inside():
    chart = parsed({"up": [(10, -4.0), (20, 3.0), (30, 11.0)]})
    (x0, y0), (x1, y1), (x2, y2) = places(chart.find("polyline"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 > y1 > y2
    assert 0 < x0 and x2 < figures._WIDTH and figures._TOP <= y2 and y0 < figures._HEIGHT


def test_smoothing_starts_above_forty_points():
    def lines(count):
        points = [(i, float(i % 2)) for i in range(count)]
        return parsed({"a": points}).findall("polyline")

    assert len(lines(40)) == 1
    raw, mean = lines(41)
    spread = [max(y) - min(y) for y in ([y for _, y in places(line)] for line in (raw, mean))]
    assert spread[1] < spread[0] / 2


def test_smooth_is_a_centred_mean():
    points = [(0, 3.0), (1, 0.0), (2, 6.0), (3, 0.0)]
    assert figures.smooth(points, 1) == [(0, 1.5), (1, 3.0), (2, 2.0), (3, 3.0)]


def test_long_runs_stay_small_and_keep_spikes():
    points = [(i, 100.0 if i == 12_345 else 1.0) for i in range(20_000)]
    chart = parsed({"a": points})
    raw = places(chart.findall("polyline")[0])
    assert len(raw) <= figures._MAX_DRAWN
    assert min(y for _, y in raw) == pytest.approx(figures._TOP)
    assert len(chart.findall("rect")) <= figures._MAX_HOVER


def test_what_is_not_finite_is_left_out():
    assert figures.line_chart("t", {}) == ""
    assert figures.line_chart("t", {"a": [(0, math.nan)], "b": []}) == ""
    assert len(places(parsed({"a": [(0, 1.0), (1, math.inf), (2, 2.0)]}).find("polyline"))) == 2


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9, 1e12])
def test_a_single_point_can_be_drawn(value):
    assert parsed({"a": [(3, value)]}).find("circle") is not None


def test_tooltips_hold_the_values_of_a_step():
    chart = parsed({"a": [(0, 0.5), (2, 0.25)], "b": [(2, 1.0)]}, percent=True)
    assert [e.text for e in chart.iter("title")] == ["step 0\na: 50%", "step 2\na: 25%\nb: 100%"]


@pytest.mark.parametrize("end", [0.0, 0.5, 1.0])
def test_end_labels_keep_apart(end):
    chart = parsed({name: [(0, 0.0), (1, 1.0), (2, end)] for name in "abcd"})
    heights = sorted(float(e.get("y")) for e in chart.iter("text") if e.get("class") == "label")
    assert all(b - a >= 14.9 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[-1] < figures._HEIGHT - figures._BOTTOM + 10


def test_large_values_are_shortened():
    texts = [e.text for e in parsed({"a": [(0, 0.0), (1, 9000.0)]}).iter("text")]
    assert "10k" in texts and "5000" in texts
    assert "1.5M" in [e.text for e in parsed({"a": [(0, 0), (1, 1.5e6)]}).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (0.03, 0.41, (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        (-7, 104, (-25, 0, 25, 50, 75, 100, 125)),
    ],
)
def test_ticks_are_nice_and_enclose_the_data(low, high, ticks):
    assert figures.nice_ticks(low, high) == ticks


@pytest.mark.parametrize("mode, background", [("light", "#ffffff"), ("dark", "#1a1e22")])
def test_colours_stand_out_from_the_background(mode, background):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in figures._PALETTE[mode]:
        darker, lighter = sorted([luminance(colour), luminance(background)])
        assert (lighter + 0.05) / (darker + 0.05) >= 3, colour
