"""The report in a real browser: it opens without a network, nothing complains, and
it can be read on a wide and a narrow window, light and dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_specplugin.tools.ab.command import write_report

from .browser import browser
from .test_report import report

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "screenshots"
"""What the pages looked like in the last run."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


def written(folder: Path, **how) -> Path:
    write_report(report(**how), folder)
    return folder / "report.html"


@pytest.mark.parametrize("served", [False, True], ids=["offline", "served"])
def test_the_report_opens_and_can_be_read(page, tmp_path, served):
    html = written(tmp_path, served=served)
    for scheme, width in (("light", 1200), ("dark", 1200), ("light", 420)):
        page.look(scheme, width)
        page.open(html)
        assert page.problems == []
        kind = "served" if served else "offline"
        shot = SHOTS / f"report-{kind}-{scheme}-{width}.png"
        page.screenshot(shot)
        assert shot.stat().st_size > 20_000
        assert page.evaluate("document.querySelector('h1').innerText") == ("Does speculation pay?")
        # nothing sticks out of the page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, paper[4:-1].split(","))) > 600
        assert light == (scheme == "light")


def test_every_plot_is_drawn_inside_its_frame(page, tmp_path):
    page.look("light", 1200)
    page.open(written(tmp_path))
    plots = page.evaluate(
        "[...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))"
    )
    assert plots[0] == "ratio of speeds with intervals"
    assert {"tokens per second, T=0", "tokens per second, T=1"} <= set(plots)
    assert "acceptance, batch 8, T=1" in plots
    assert "speed of single requests, batch 1, T=0" in plots
    assert plots[-1] == "time of a step by part"
    outside = page.evaluate(
        """[...document.querySelectorAll('svg')].flatMap(s => {
            const [,, w, h] = s.getAttribute('viewBox').split(' ').map(Number);
            return [...s.querySelectorAll('text,rect,circle,line')].filter(e => {
                const b = e.getBBox();
                return b.x < -1 || b.y < -1 || b.x + b.width > w + 1
                    || b.y + b.height > h + 1;
            }).map(e => e.outerHTML.slice(0, 120));
        })"""
    )
    assert outside == []
    assert page.evaluate("document.querySelectorAll('circle.faster').length") == 12
    assert "NaN" not in page.evaluate("document.documentElement.outerHTML")


def test_words_of_others_are_not_markup(page, tmp_path):
    page.open(written(tmp_path))
    assert page.evaluate("document.querySelectorAll('model').length") == 0
    assert "no such <model>" in page.evaluate("document.body.innerText")


def test_a_page_that_complains_or_asks_for_more_would_be_noticed(page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<script>console.error('planted'); undefined_name()</script>"
        "<img src='http://127.0.0.1:9/x.png'>"
    )
    page.open(bad)
    found = "\n".join(page.problems)
    assert "planted" in found and "Uncaught" in found
    assert "request http://127.0.0.1:9/x.png" in found
