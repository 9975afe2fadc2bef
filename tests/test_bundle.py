"""A bug report holds what helps, and nothing private."""

from __future__ import annotations

import http.server
import json
import tarfile
import threading

import numpy as np
import pytest

from vllm_specplugin import ConfigError
from vllm_specplugin.bundle import write_bundle
from vllm_specplugin.cli import main
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.redaction import configuration, environment, log_lines
from vllm_specplugin.step.trace import TraceWriter
from vllm_specplugin.testing import engine_info, step_outcome
from vllm_specplugin.trees.batch import Drafted, Forest
from vllm_specplugin.trees.tree import DraftTree

SECRET = "the merger closes on friday"
TOKENS = [48121, 48122, 48123]
KEY, USER = "sk-abcdef123456", "alicesmith"
HOME = "/".join(["", "home", USER])  # no path of a machine in the repository
PRIVATE = [SECRET, "merger", "friday", KEY, USER, *map(str, TOKENS), "cmpl-77", HOME]

ENVIRON = {
    "VLLM_API_KEY": KEY,
    "HF_TOKEN": KEY,
    "USER": USER,
    "HOME": HOME,
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_CACHE_ROOT": f"{HOME}/cache",
    "VLLM_PORT": KEY,
    "AWS_SECRET_ACCESS_KEY": KEY,
    "OMP_NUM_THREADS": "2",
}

LOG = f"""\
(APIServer pid=12) INFO 11-24 09:51:57 [logger.py:39] Received request cmpl-77: \
prompt: '{SECRET}', params: SamplingParams(temperature=1.0), prompt_token_ids: {TOKENS}
(EngineCore pid=13) WARNING 11-24 09:52:01 [core.py:5] {SECRET} went wrong
INFO 11-24 09:52:00 [state.py:1] vllm-specplugin 0.1.0 is active on TreeCPUModelRunner \
of vLLM 0.32.0: proposer=suffix scorer=exact policy=goodput max_nodes=16 ({HOME})
WARNING 11-24 09:52:01 [drafting.py:9] drafts lost (proposer_error), counted from now \
on: KeyError: {SECRET}
WARNING 11-24 09:52:01 [scoring.py:9] request cmpl-77 is scored by the default: {SECRET}
WARNING 11-24 09:52:02 [trace.py:9] trace {HOME}/x.trace ends here: No space left
INFO 11-24 09:52:03 [reporter.py:9] specplugin, last 10.0 s: 2154 tokens in 402 steps \
(2.68 per request and step), 9% of steps without drafts, drafting 6% of the time
ERROR 11-24 09:52:03 [device_side.py:9] proposer '{SECRET}' failed
ERROR 11-24 09:52:03 [device_side.py:9] Traceback (most recent call last):
ERROR 11-24 09:52:03 [device_side.py:9]   File "{HOME}/mine.py", line 7, in propose
ERROR 11-24 09:52:03 [device_side.py:9]     raise ValueError("{SECRET}")
ERROR 11-24 09:52:03 [device_side.py:9] ValueError: {SECRET}
  File "{HOME}/other.py", line 8, in call
    prompt = "{SECRET}"
RuntimeError: {SECRET}
{SECRET}
"""


@pytest.fixture
def trace(tmp_path):
    engine = engine_info(vocab_size=60_000, max_model_len=128, max_num_seqs=2, max_nodes=4)
    options = {"proposer": {"min_survival": 0.2}}
    config = SpecConfig(trace=f"{HOME}/x.trace", options=options).to_dict()
    config["options"]["proposer"]["model"] = f"{HOME}/model"
    writer = TraceWriter(tmp_path / "x.trace", 1.0, config, engine)
    forest = Forest.of([DraftTree([*TOKENS], [-1, 0, 0])])
    drafted = Drafted(
        forest=forest,
        place={"cmpl-77": 0},
        asked=np.array([True]),
        sampled=np.zeros(3, bool),
        ends=np.array([20]),
        kept=np.array([True, True, False]),
    )
    told = step_outcome([2], [1], req_ids=["cmpl-77"], num_tokens=[20], draft_seconds=0.001)
    writer.step(told, np.array([[TOKENS[0], TOKENS[1]]]), {}, drafted)
    writer.close()
    return tmp_path / "x.trace"


def contents(path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            entry.name.removeprefix("specplugin/"): archive.extractfile(entry).read().decode()
            for entry in archive
        }


def test_a_bundle_holds_what_helps_and_nothing_private(tmp_path, trace, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    (tmp_path / "log").write_text(LOG)
    path = tmp_path / "bundle.tar.gz"
    report = [f"ok    python: 3.11 in {HOME}/venv", "FAIL  seam: x takes y"]
    names = write_bundle(path, report, logs=[tmp_path / "log"], trace=trace, environ=ENVIRON)
    found = contents(path)
    assert list(found) == names
    for name, text in found.items():
        for private in PRIVATE:
            assert private not in text, name
    assert json.loads(found["versions.json"])["torch"]
    assert json.loads(found["machine.json"])["cpus"] >= 1
    told = json.loads(found["environment.json"])
    assert told["VLLM_CPU_KVCACHE_SPACE"] == "4" and told["OMP_NUM_THREADS"] == "2"
    assert told["VLLM_API_KEY"] == "<set>" and "AWS_SECRET_ACCESS_KEY" not in told
    made = json.loads(found["configuration.json"])
    assert made["proposer"] == "suffix" and made["max_nodes"] == 16
    assert made["options"]["proposer"] == {"min_survival": 0.2, "model": "<string>"}
    (step,) = map(json.loads, found["trace.jsonl"].splitlines())
    assert step["r"] == [[0, 20, 0, 2, 1, 2]]
    assert step["f"][0][:4] == [0, 20, 3, [-1, 0, 0]] and step["f"][0][5] == [0, 1]
    assert "seam: x takes y" in found["doctor.txt"]
    assert "no prompt" in found["README.txt"]
    log = found["log.txt"]
    for line in (
        "INFO 11-24 09:51:57 [logger.py:39]\n",
        "[state.py:1] proposer=suffix scorer=exact policy=goodput max_nodes=16\n",
        "[drafting.py:9] drafts lost (proposer_error), counted from now on KeyError\n",
        "[reporter.py:9] last 10.0 s: 2154 tokens in 402 steps (2.68 per request",
        "    mine.py:7 in propose\n",
        "[device_side.py:9] ValueError\n",
        "    other.py:8 in call\n",
        "    RuntimeError\n",
    ):
        assert line in log


def test_whatever_is_in_a_log_only_what_is_known_gets_through():
    rng = np.random.default_rng(0)
    parts = ["INFO", "11-24 09:51:57", "[state.py:1]", "File", '"', "'", ": ", "line 3"]
    heads = ["", "INFO 11-24 09:51:57 [state.py:1] ", "ERROR 11-24 09:51:57 [core.py:1] "]
    for head in heads[::2]:
        for _ in range(300):
            around = "".join(rng.choice([*parts, " ", "x"], 6))
            line = f"{head}{around[:9]} {SECRET}: {TOKENS} {around}"
            assert "merger" not in "\n".join(log_lines([line], frozenset({"state.py"})))


def test_values_that_only_look_like_settings_are_left_out():
    assert environment({"VLLM_X": "a/b", "VLLM_Y_TOKEN": "1", "PATH": "x"}) == {
        "VLLM_X": "<set, 3 characters>",
        "VLLM_Y_TOKEN": "<set>",
    }
    assert configuration({"proposer": "a/b", "x y": 1, "scorer": "exact"}) == {
        "proposer": "<string>",
        "<key>": 1,
        "scorer": "exact",
    }
    assert configuration({"begin": TOKENS}) == {"begin": ["<3 values>"]}


class Status(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = {
            "active": True,
            "summary": SECRET,
            "configuration": {"proposer": "suffix", "trace": HOME},
            "since_start": {"steps": 3, "failures": {"timeout": 1}},
        }
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_a_running_server_is_asked(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        write_bundle(tmp_path / "a.tar.gz", [], url=url)
    found = contents(tmp_path / "a.tar.gz")
    assert json.loads(found["status.json"])["since_start"] == {
        "steps": 3,
        "failures": {"timeout": 1},
    }
    assert SECRET not in str(found) and HOME not in str(found)
    write_bundle(tmp_path / "b.tar.gz", [], url="file:///etc/passwd")
    found = contents(tmp_path / "b.tar.gz")
    assert json.loads(found["status.json"]) == {"unreachable": 1, "ValueError": 1}


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ConfigError, match="a new file that can be written"):
        write_bundle(tmp_path / "a", [])
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(ConfigError, match="check the path"):
        write_bundle(tmp_path / "b", [], logs=[tmp_path / "none"])
    assert not (tmp_path / "b").exists()


def test_the_command_writes_one(tmp_path, capsys):
    path = tmp_path / "bundle.tar.gz"
    assert main(["doctor", "--bundle", str(path)]) == 0
    assert "look through it before you send it" in capsys.readouterr().out
    assert "the plugin works" not in contents(path)["doctor.txt"]
    assert "ok    seams" in contents(path)["doctor.txt"]
    assert main(["doctor", "--url", "http://x"]) == 2
    assert "expected --bundle FILE" in capsys.readouterr().err
