"""What the doctor says where everything is in place."""

from __future__ import annotations

import json

from vllm_specplugin import __version__
from vllm_specplugin.cli import main


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
