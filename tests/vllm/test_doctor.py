"""What the doctor says where everything is in place."""

from __future__ import annotations

import json

from vllm_specplugin import __version__
from vllm_specplugin.cli import main
from vllm_specplugin.vllm.doctor import _openmp


def test_doctor_is_content_here(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "the plugin works here" in shown
    assert "FAIL" not in shown


def test_doctor_says_the_same_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is True
    assert found["versions"]["vllm-specplugin"] == __version__
    assert found["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert found["seams"]["compared"] > 50
    assert found["seams"]["differences"] == []
    assert {"python", "vllm", "seams", "platform"} <= {f["subject"] for f in found["findings"]}
    assert "server" not in found


def test_doctor_says_how_to_preload_openmp(monkeypatch, tmp_path):
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    (missing,) = _openmp()
    assert f"LD_PRELOAD={library}" in missing.remedy and not missing.bad
    monkeypatch.setenv("LD_PRELOAD", str(library))
    (there,) = _openmp()
    assert there.text == "libiomp is preloaded" and not there.remedy
