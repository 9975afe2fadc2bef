"""The demo's engine process, without an engine: it hands on what each while adds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from examples.demo import decoding as module
from examples.demo.decoding import Decoding


class FakeLLM:
    """Emits its text two tokens a step; ``generate`` only fills the prefix cache."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.llm_engine = self
        self.said: list[tuple] = []

    def generate(self, prompt, params, use_tqdm):
        self.said.append(("filled", prompt["prompt_token_ids"], params["max_tokens"]))
        self.clock[0] += 7.0

    def add_request(self, name, prompt, params):
        self.said.append(("began", name, prompt["prompt_token_ids"]))
        self.left, self.text = params["max_tokens"], []

    def abort_request(self, names):
        self.said.append(("aborted", *names))

    def step(self):
        self.clock[0] += 0.04
        count = min(2, self.left)
        self.left -= count
        self.text += [len(self.text) + i for i in range(count)]
        completion = SimpleNamespace(token_ids=list(self.text))
        return [SimpleNamespace(outputs=[completion], finished=not self.left)]


@pytest.fixture
def llm(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(module.engine, "sampling_params", lambda **values: values)
    return FakeLLM(clock)


def test_each_while_adds_its_tokens_and_nothing_else_is_timed(llm):
    decoding = Decoding()
    decoding.begin(llm, {"prompt": [5, 6], "params": {"max_tokens": 7}})
    first = decoding.go_on(llm, {"seconds": 0.1})
    rest = decoding.go_on(llm, {"seconds": 9.0})
    assert first["tokens"] == [0, 1, 2, 3, 4, 5] and first["steps"] == 3
    assert first["seconds"] == pytest.approx(0.12) and not first["finished"]
    assert rest["tokens"] == [6] and rest["steps"] == 1 and rest["finished"]
    assert llm.said == [("filled", [5, 6], 1), ("began", "demo-1", [5, 6])]


def test_an_unfinished_request_makes_room_for_the_next(llm):
    decoding = Decoding()
    decoding.begin(llm, {"prompt": [5], "params": {"max_tokens": 9}})
    decoding.go_on(llm, {"seconds": 0.01})
    decoding.begin(llm, {"prompt": [6], "params": {"max_tokens": 1}})
    assert decoding.go_on(llm, {"seconds": 1.0})["tokens"] == [0]
    assert ("aborted", "demo-1") in llm.said and ("began", "demo-2", [6]) in llm.said
