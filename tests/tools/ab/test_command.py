"""Bad input: one clear message each, before any engine starts."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_specplugin.cli import main
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.tools.ab import measure as measuring
from vllm_specplugin.tools.ab.command import check_model
from vllm_specplugin.tools.ab.servers import check_port, flags, free_port
from vllm_specplugin.tools.ab.variants import parse_variant
from vllm_specplugin.tools.engine_client import EngineError

from .fakes import FakeEngine


@pytest.fixture(autouse=True)
def no_engines(monkeypatch):
    def never(*_, **__):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(measuring, "EngineProcess", never)
    monkeypatch.setattr("vllm_specplugin.tools.ab.serve.EngineProcess", never)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    return str(tmp_path / "m")


def refused(capsys, *arguments: str) -> str:
    assert main(["ab", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("specplugin: ")
    assert "To fix it: " in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant=sufix"], "variant 'sufix': proposer 'sufix'"),
        (["--variant=vllm:x"], "expected a method of the installed vLLM"),
        (["--prompts=builtin:x"], "prompts 'builtin:x'"),
        (["--prompts=/nowhere/p.jsonl"], "prompt file /nowhere/p.jsonl"),
        (["--engine={"], "--engine '{'"),
        (["--engine=[]"], "not an object"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--rounds=0"], "--rounds 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--confidence=1"], "--confidence 1.0"),
        (["--serve", "--rate", "0"], "--rate 0"),
        (["--serve", "--slo", "speed:3"], "--slo 'speed:3' ('speed' is no such time)"),
        (["--serve", "--slo", "ttft:x"], "--slo 'ttft:x'"),
        (["--url=localhost:80", "--url=http://b"], "--url localhost:80"),
        (["--url=http://a"], "one --url"),
        (["--url=http://a", "--url=http://a"], "different names"),
        (["--url=http://a", "--variant=suffix"], "--variant together with --url"),
        (["--url=http://127.0.0.1:1", "--url=b=http://127.0.0.1:1"], "a running vLLM"),
    ],
)
def test_a_wrong_value_is_named(capsys, model, arguments, message):
    assert message in refused(capsys, f"--model={model}", *arguments)


def test_a_broken_line_of_a_prompt_file_has_its_number(capsys, model, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"one"\n"two"\n{"text": 3}\n')
    message = refused(capsys, f"--model={model}", f"--prompts={path}")
    assert f"{path}:3: " in message and 'a string "prompt"' in message


def test_too_few_prompts_for_the_batch(capsys, model, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\n")
    message = refused(capsys, f"--model={model}", f"--prompts={path}", "--batch", "4")
    assert "2 prompts in" in message and "at least 4" in message


def test_models(capsys, tmp_path, model):
    assert "no --model" in refused(capsys, "--batch", "1")
    missing = tmp_path / "missing"
    assert f"--model {missing}" in refused(capsys, f"--model={missing}")
    check_model(model)
    check_model("meta-llama/Llama-3.1-8B")  # vLLM asks the hub
    with pytest.raises(ConfigError, match=r"with config\.json, or a hub id"):
        check_model("./no/such/folder")


def test_a_port_in_use(capsys, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(capsys, f"--model={model}", "--serve", f"--port={port - 1}")
        assert f"port {port} (" in message and "name another --port" in message
        with pytest.raises(ConfigError, match="a free one"):
            check_port(70000)
    check_port(free_port())


def test_an_output_folder_that_cannot_be_made(capsys, model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, f"--model={model}", f"--out={tmp_path}/file/x")


def test_a_server_that_is_none(capsys):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        message = refused(capsys, f"--url=a={url}", f"--url=b={url}")
        assert "HTTP Error 404" in message
        server.shutdown()


def test_flags_say_the_same_as_arguments():
    variant = parse_variant("vllm:ngram")
    found = flags({"enable_prefix_caching": False, **variant.engine}, None)
    assert found[0] == "--no-enable-prefix-caching"
    name, _, value = found[1].partition("=")
    assert name == "--speculative-config"
    assert json.loads(value)["method"] == "ngram"
    ours = parse_variant('suffix:{"max_nodes": 4, "draft_timeout_ms": 50}')
    assert flags({}, ours.speculate) == [
        "--spec-proposer=suffix",
        "--spec-scorer=exact",
        "--spec-policy=goodput",
        "--spec-max-nodes=4",
        '--spec-options={"draft_timeout_ms": 50}',
    ]


def test_the_command_measures_and_writes(monkeypatch, capsys, model, tmp_path):
    monkeypatch.setattr(measuring, "EngineProcess", FakeEngine)
    out = tmp_path / "out"
    arguments = ["ab", f"--model={model}", f"--out={out}", "--rounds=3", "--batch", "2"]
    assert main(arguments) == 0
    assert "suffix+exact+goodput" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "report.svg"}


def test_where_nothing_could_be_compared_the_command_fails(monkeypatch, capsys, model, tmp_path):
    class Broken(FakeEngine):
        def ask(self, do, **request):
            raise EngineError("engine ended with code 1")

    monkeypatch.setattr(measuring, "EngineProcess", Broken)
    assert main(["ab", f"--model={model}", f"--out={tmp_path / 'o'}"]) == 1
    assert "the reference, failed while loading" in capsys.readouterr().out
