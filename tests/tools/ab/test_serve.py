"""Served load: vLLM's server and vLLM's benchmark, and what happens around them."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_specplugin.tools.ab import serve as module
from vllm_specplugin.tools.ab.measure import Plan
from vllm_specplugin.tools.ab.prompts import PromptSet
from vllm_specplugin.tools.ab.records import Cell, Record
from vllm_specplugin.tools.ab.report import build_report
from vllm_specplugin.tools.ab.report_md import markdown
from vllm_specplugin.tools.ab.serve import LoadPlan, measure_served
from vllm_specplugin.tools.ab.servers import ServerProcess, model_at
from vllm_specplugin.tools.ab.variants import Variant, parse_variants
from vllm_specplugin.tools.engine_client import EngineError

from .fakes import SPEC, Bar

CELLS = [Cell(concurrency=2), Cell(rate=4.0)]
PROMPTS = PromptSet("file.txt", [f"p{i}" for i in range(14)])


class FakeDriver:
    """Stands in for the process that runs the benchmark."""

    log: list = []  # noqa: RUF012 (reset by the fixture)
    fails = ""

    def __init__(self, *_, **__):
        pass

    def ask(self, do, **request):
        if do != "drive":
            return True
        FakeDriver.log.append(request)
        if self.fails and self.fails in request["url"]:
            raise EngineError("2 requests failed, the first with Not Found")
        n = len(request["prompts"])
        return {
            "seconds": 2.0,
            "tokens": 8 * n,
            "goodput": None,
            "texts": ["x"] * n,
            "requests": [{"tokens": 8, "decode_s": 0.5}] * n,
            "latency": {"ttft": [0.1] * n, "tpot": [0.1] * n, "itl": [], "e2el": [1.0] * n},
            "spec": dict(SPEC),
        }

    def close(self, patience=10):
        pass


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(module, "EngineProcess", FakeDriver)
    monkeypatch.setattr(module, "model_at", lambda url: f"model of {url}")
    monkeypatch.setattr(FakeDriver, "log", [])
    monkeypatch.setattr(FakeDriver, "fails", "")
    return FakeDriver


def load(rounds: int = 3) -> LoadPlan:
    variants = [Variant(n, n, "url", url=f"http://{n}") for n in ("a", "b")]
    plan = Plan("", variants, CELLS, PROMPTS, rounds, 8)
    return LoadPlan(plan, requests=2, limits={"ttft": 100.0})


def measured(plan: LoadPlan) -> Record:
    record, bar = Record(plan.plan.variants, plan.plan.cells), Bar()
    measure_served(plan, record, bar)
    assert record.errors or bar.n == bar.total
    return record


def test_both_servers_get_the_same_requests_at_the_same_times(driver):
    measured(load())
    runs = [r for r in driver.log if r["max_tokens"] == 8]
    assert [r["url"] for r in runs[:6]] == ["http://a", "http://b"] * 2 + ["http://b", "http://a"]
    for one, two in zip(runs[::2], runs[1::2]):
        for key in ("prompts", "seeds", "arrival_seed", "rate", "concurrency"):
            assert one[key] == two[key]
    assert runs[0]["model"] == "model of http://a"
    assert runs[0]["limits"] == {"ttft": 100.0}


def test_every_round_and_cell_has_prompts_of_its_own(driver):
    record = measured(load())
    runs = [tuple(r["prompts"]) for r in driver.log if r["url"] == "http://a"]
    assert len(set(runs[2:])) == 2 * 3  # after the two warm-ups, which share theirs
    assert not set(runs[:2]) & set(runs[2:])
    assert not build_report(record, PROMPTS, {}, confidence=0.99)["prompts"]["reused"]
    record = measured(load(rounds=4))
    report = build_report(record, PROMPTS, {}, confidence=0.99, served=True)
    assert report["prompts"]["reused"]
    assert "Prompts came more than once" in markdown(report)


def test_speed_is_that_of_all_or_of_a_request(driver):
    speeds = {run["cell"]: run["speed"] for run in measured(load()).runs}
    assert speeds == {"concurrency 2, T=0": 8.0, "4 requests/s, T=0": 8.0 * 2 / 2.0}


def test_a_server_that_fails_is_a_row(driver):
    driver.fails = "//b"
    record = measured(load())
    assert record.errors["b"].startswith("while warming up: 2 requests failed")
    assert {run["variant"] for run in record.runs} == {"a"}


def test_the_model_is_asked_of_the_server():
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "the model"}]}).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert model_at(f"http://127.0.0.1:{server.server_port}") == "the model"
        server.shutdown()


def test_servers_start_with_what_the_variant_says(monkeypatch, driver):
    started = []

    class Server(ServerProcess):
        def __init__(self, name, model, arguments, port, *, mend):
            started.append((name, arguments, port, mend))
            self.url = f"http://{port}"

        def wait_until_ready(self):
            return "m"

        def close(self, patience=20):
            pass

    monkeypatch.setattr(module, "ServerProcess", Server)
    variants = parse_variants(["baseline", "vllm:ngram", "suffix"])
    plan = Plan("m", variants, CELLS, PROMPTS, 1, 8, engine={"dtype": "float32"})
    record = measured(LoadPlan(plan, requests=2, port=9000))
    assert [(name, port, mend) for name, _, port, mend in started] == [
        ("baseline", 9000, False),
        ("vllm:ngram", 9001, True),
        ("suffix", 9002, False),
    ]
    assert "--dtype=float32" in started[0][1]
    assert "--spec-proposer=suffix" in started[2][1]
    assert record.repaired == {"vllm:ngram"}
