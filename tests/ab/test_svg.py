from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from vllm_specplugin.tools.ab.plots_svg import (
    acceptance_plot,
    load_plot,
    parts_plot,
    ratio_plot,
    request_plot,
)
from vllm_specplugin.tools.ab.svg import Scale, circle, path, picture, series, text, ticks

from .test_report import report


def test_scales():
    linear = Scale(0, 10, 100, 200)
    assert [linear(v) for v in (-5, 0, 5, 10, 50)] == [100, 100, 150, 200, 200]
    log = Scale(0.5, 2, 0, 100, log=True)
    assert [log(v) for v in (0.5, 1, 2)] == [0, 50, 100]
    assert Scale(3, 3, 0, 100)(3) == 50


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 97, [0, 20, 40, 60, 80]),
        (0.7, 1.3, [0.8, 1.0, 1.2]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_pieces_are_escaped_and_well_formed():
    drawn = picture(
        10,
        5,
        'a "label" & more',
        [text(1, 2, "<b>"), circle(1, 1, 2, "s0", "x < y"), path([(0, 1), (2, 3)], "s1")],
    )
    root = ET.fromstring(drawn)
    assert root.get("viewBox") == "0 0 10 5"
    assert root.get("aria-label") == 'a "label" & more'
    assert root[0].text == "<b>" and root[1][0].text == "x < y"
    assert root[2].get("points") == "0,1 2,3"
    assert series(9) == series(1) == "s1"


PLOTS = (ratio_plot, load_plot, acceptance_plot, request_plot, parts_plot)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_plots_are_well_formed_and_empty_without_data(plot):
    ET.fromstring(f"<p>{plot(report())}</p>")
    empty = report(rounds=0)
    assert "<circle" not in plot(empty) and "<polyline" not in plot(empty)


def test_an_unknown_interval_reaches_across_and_is_dashed():
    one = report()
    ratio = one["cells"][0]["rows"][1]["ratio"]
    ratio.update(low=0.0, high=None, verdict="too few rounds")
    root = ET.fromstring(ratio_plot(one))
    dashed = [e for e in root.iter("line") if "unsure" in e.get("class", "")]
    assert len(dashed) == 1
    assert float(dashed[0].get("x2")) - float(dashed[0].get("x1")) > 300


def test_marks_of_a_ratio_are_where_the_ratio_is():
    root = ET.fromstring(ratio_plot(report(2.0)))
    ones = [e for e in root.iter("line") if e.get("class") == "one"]
    marks = [float(e.get("cx")) for e in root.iter("circle") if e.get("class") == "faster fill"]
    assert len(ones) == 1 and len(marks) == 12
    assert min(marks) > float(ones[0].get("x1"))
    two = next(e for e in root.iter("text") if e.text == "2x")
    assert marks[0] == pytest.approx(float(two.get("x")), abs=3)


def test_parts_are_as_long_as_they_took():
    root = ET.fromstring(parts_plot(report()))
    widths = {}
    for rect in root.iter("rect"):
        tip = rect.find("title").text if rect.find("title") is not None else ""
        if tip.startswith("suffix: ") and tip.split()[1] not in widths:
            widths[tip.split()[1]] = float(rect.get("width"))
    assert widths["verify"] == pytest.approx(5 * widths["draft"], rel=0.02)
    assert widths["host"] == pytest.approx(1.5 * widths["sample"], rel=0.02)
