from __future__ import annotations

import re

import pytest

from vllm_specplugin import __version__
from vllm_specplugin.cli import main


def test_list_shows_every_role(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("proposers:", "suffix", "ngram", "none", "scorers:", "exact"):
        assert name in shown
    assert "policies:\n  aimd" in shown


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_doctor_fails_with_the_remedy(capsys, monkeypatch):
    from vllm_specplugin.vllm.compat import seams

    monkeypatch.setattr(seams, "installed_version", lambda: "0.31.0")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"FAIL\s+vllm: vLLM 0\.31\.0", shown)
    assert "to fix it" in shown


def test_doctor_is_content_here(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "the plugin works here" in shown
    assert "FAIL" not in shown
