"""The demo from the command line, with an engine that answers at once."""

from __future__ import annotations

import io
import time as times

import pytest

from examples.demo import run as module
from examples.demo.rounds import PLAIN, Round, Run
from examples.demo.run import main
from examples.demo.screen import Lines, Panes
from tests.examples.demo.fakes import FakeDecoding, Time


class Fake(FakeDecoding):
    """Loads for a while, of the same time as it decodes in."""

    made: Fake
    clock: Time
    loads_for = 12.0
    wrong = False

    def __init__(self, name, settings, module) -> None:
        super().__init__(Fake.clock, spoil=self._spoiled)
        self.settings = settings
        Fake.made = self

    def _spoiled(self, proposer, tokens):
        return [0, *tokens[1:]] if self.wrong and proposer == "suffix" else tokens

    def wait_until_ready(self):
        ends = self.time.now + self.loads_for
        while self.time.now < ends and not self.killed:
            self.time.now += 0.5
            times.sleep(0.002)
        return self


@pytest.fixture
def demo(monkeypatch, capsys):
    monkeypatch.setattr(Fake, "clock", Time(), raising=False)
    monkeypatch.setattr(module, "EngineProcess", Fake)
    monkeypatch.setattr(module, "Clock", Fake.clock.clock)
    monkeypatch.setattr(module, "inflated_model", lambda path: path)
    monkeypatch.setattr(module, "_GLANCE", 0.001)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        return code, capsys.readouterr().out

    return run


def test_from_loading_to_the_result(demo):
    code, out = demo()
    assert code == 0
    assert 80 < Fake.clock.now < 90
    assert "importing vLLM" in out and "round 1, T=0: no drafts 100.0" in out
    assert out.index("round 1") < out.index("tokens/s  ") and "identical in all" in out
    assert "\x1b" not in out and all(len(line) <= 100 for line in out.splitlines())
    assert Fake.made.closed
    assert Fake.made.settings["speculate"]["proposer"] == "draft_model"


def test_other_text_fails_the_demo(demo, monkeypatch):
    monkeypatch.setattr(Fake, "wrong", True)
    code, out = demo("--seconds", "30")
    assert code == 1
    assert "DIFFERENT text" in out and "DIFFERENT in" in out


def test_an_engine_that_loads_for_too_long_is_ended(demo, monkeypatch):
    monkeypatch.setattr(Fake, "loads_for", 1000.0)
    code, out = demo()
    assert code == 1
    assert Fake.clock.now < 90
    assert Fake.made.killed and Fake.made.closed
    assert "No round was complete" in out


def test_preparing_measures_nothing(demo, monkeypatch):
    monkeypatch.setattr(Fake, "loads_for", 1000.0)
    code, out = demo("--prepare")
    assert code == 0
    assert "warming up" in out and "round" not in out and "tokens/s" not in out
    assert Fake.made.closed and len(Fake.made.begun) == 6


def panes(now: Round, way: str) -> list[str]:
    from rich.console import Console

    shown = Panes(Time().clock(60), lambda tokens: "x = [1]\n" * len(tokens))
    out = io.StringIO()
    shown._live.console = Console(
        file=out, width=100, height=24, force_terminal=True, color_system=None
    )
    with shown:
        shown.decoding(now, way)
    return out.getvalue().splitlines()


def test_panes_stand_side_by_side():
    runs = {
        PLAIN: Run([1, 2, 3], 3, 0.03, finished=True),
        "suffix": Run([1, 2, 3], 1, 0.01, finished=True),
        "draft_model": Run([1, 9, 3], 2, 0.02, finished=True),
    }
    text = "\n".join(panes(Round(4, 1.0, runs), "suffix"))
    tops = next(line for line in text.splitlines() if PLAIN in line)
    assert "suffix" in tops and "draft_model" in tops
    assert "round 5, temperature 1" in text and "60 s left" in text
    assert "suffix: same text" in tops and "draft_model: DIFFERENT text" in tops
    assert "300 tokens/s, 3.0 a step" in text


def test_loading_lines_come_at_changes_and_every_few_seconds():
    time, out = Time(), io.StringIO()
    lines = Lines(time.clock(60), out)
    for _ in range(100):
        lines.loading("importing")
        time.now += 0.1
    lines.loading("loading")
    assert out.getvalue().splitlines() == [
        "   0 s  importing", "   5 s  importing", "  10 s  loading"
    ]  # fmt: skip
