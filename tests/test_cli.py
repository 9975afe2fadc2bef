from __future__ import annotations

import http.server
import json
import re
import sys
import threading

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


def test_a_command_without_vllm_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    arguments = [
        "ab",
        "--out",
        str(tmp_path),
        "--url=http://127.0.0.1:1",
        "--url=b=http://127.0.0.1:1",
    ]
    monkeypatch.setattr("vllm_specplugin.tools.ab.command.check_servers", lambda load: None)
    assert main(arguments) == 2
    assert "no module 'tqdm': expected vLLM" in capsys.readouterr().err


def test_doctor_fails_with_the_remedy(capsys, monkeypatch):
    from vllm_specplugin.vllm.compat import seams

    monkeypatch.setattr(seams, "installed_version", lambda: "0.31.0")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"FAIL\s+vllm: 0\.31\.0 \(supported: 0\.32", shown)
    assert "to fix it" in shown


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


def test_doctors_json_without_a_supported_vllm(capsys, monkeypatch):
    from vllm_specplugin.vllm.compat import seams

    monkeypatch.setattr(seams, "installed_version", lambda: None)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["works"] is False and found["seams"] is None
    (bad,) = [finding for finding in found["findings"] if finding["bad"]]
    assert bad["text"].startswith("not installed (supported: ") and bad["remedy"]


class Status(http.server.BaseHTTPRequestHandler):
    """A server that answers as the plugin's endpoint does."""

    def do_GET(self):
        known = self.path == "/specplugin/status"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"active": True}).encode())

    def log_message(self, *_):
        pass


def test_a_running_server_is_asked(capsys):
    from vllm_specplugin.vllm.doctor import facts

    with http.server.HTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.handle_request).start()
        found = facts([], f"http://127.0.0.1:{server.server_port}/")
    assert found["server"] == {"active": True}
    assert "ValueError" in facts([], "file:///etc/passwd")["server"]["error"]
    assert "URLError" in facts([], "http://127.0.0.1:1")["server"]["error"]
    assert main(["doctor", "--url", "http://x"]) == 2
    assert "expected --json beside it" in capsys.readouterr().err
