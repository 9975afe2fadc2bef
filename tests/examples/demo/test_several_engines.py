"""The demo with --all is the A/B harness on the embedded model; here with engines that answer at
once."""

from __future__ import annotations

import json

from examples.demo import several_engines as module
from examples.demo.several_engines import demo_all
from tests.tools.ab.fakes import FakeEngine
from vllm_specplugin.tools.ab import measure as measuring


def run(monkeypatch, tmp_path, capsys, behave) -> tuple[int, str, str]:
    monkeypatch.setattr(measuring, "EngineProcess", FakeEngine)
    monkeypatch.setattr(FakeEngine, "log", [])
    monkeypatch.setattr(FakeEngine, "speed", {"suffix tree": 150.0})
    monkeypatch.setattr(FakeEngine, "behave", behave)
    monkeypatch.setattr(module, "inflated_model", lambda path: path)
    code = demo_all(rounds=3, max_tokens=8, json_path=tmp_path / "f.json")
    return code, *capsys.readouterr()


def test_the_table_and_the_figures(monkeypatch, tmp_path, capsys):
    code, out, err = run(monkeypatch, tmp_path, capsys, {})
    assert code == 0
    lines = out.splitlines()
    tree = next(line for line in lines if line.startswith("    8   1  suffix tree"))
    assert " 150.0 " in tree and " 1.50x " in tree and "without drafts" in tree
    assert any(line.startswith("    1   1  vllm ngram*") for line in lines)
    assert any(line.startswith("    1   0  vllm ngram ") for line in lines)
    assert "defect mended" in out and "figures written" in err
    report = json.loads((tmp_path / "f.json").read_text())
    assert len(report["cells"]) == 4 and report["schema"] == 1


def test_an_engine_that_fails_fails_the_demo(monkeypatch, tmp_path, capsys):
    from tests.tools.ab.fakes import dies

    code, out, err = run(monkeypatch, tmp_path, capsys, {"no drafts": dies(at=2)})
    assert code == 1
    assert "no drafts failed" in err and "suffix tree" in out
