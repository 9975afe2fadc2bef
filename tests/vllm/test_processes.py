"""What the processes of the harness make of vLLM's objects, with stand-ins."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu import model_runner as second_runner

from vllm_specplugin.utils.env import MEND, mending_wanted
from vllm_specplugin.vllm.processes import step_parts
from vllm_specplugin.vllm.processes.ab import _difference, _logprobs, _request
from vllm_specplugin.vllm.processes.bench import _answer
from vllm_specplugin.vllm.processes.step_parts import timed_parts


class Model:
    def compute_logits(self, hidden):
        time.sleep(0.01)
        return hidden


class Runner:
    """Two parts inside a third: what is nested belongs to the outer."""

    def __init__(self):
        self.model = Model()

    def _model_forward(self):
        time.sleep(0.03)

    def _sample(self):
        time.sleep(0.01)

    def propose_draft_token_ids(self):
        self.model.compute_logits(1)
        time.sleep(0.02)
        return [[1]]

    def step(self):
        self._model_forward()
        self.model.compute_logits(1)
        self._sample()
        return self.propose_draft_token_ids()


class SecondRunner:
    """The target's head is called where it samples, its forward pass in a context."""

    req_states = None
    cudagraph_manager = None

    def __init__(self, spend):
        self._spend = spend
        self.model = SimpleNamespace(compute_logits=lambda: spend(1))
        self.speculator = SimpleNamespace(propose=lambda: spend(20))

    def sample(self):
        self._spend(300)
        self.model.compute_logits()

    def step(self):
        with second_runner.set_forward_context():
            self._spend(4000)
        self.sample()
        self.speculator.propose()


def test_the_second_runner_has_the_same_parts(monkeypatch):
    spent = []
    monkeypatch.setattr(step_parts, "_now", lambda: sum(spent))
    monkeypatch.setattr(second_runner, "set_forward_context", nullcontext)
    runner = SecondRunner(spent.append)
    with timed_parts(engine(runner)) as result:
        runner.step()
        parts = result(5000.0)
    assert parts == {"verify": 4001, "sample": 300, "draft": 20, "host": 679, "steps": 1}
    assert second_runner.set_forward_context is nullcontext
    assert "sample" not in vars(runner)


def engine(runner, world_size=1):
    worker = SimpleNamespace(model_runner=runner)
    parallel = SimpleNamespace(world_size=world_size)
    config = SimpleNamespace(parallel_config=parallel)
    return SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=config), collective_rpc=lambda call: [call(worker)]
    )


def test_parts_are_timed_once_and_left_as_they_were():
    runner = Runner()
    with timed_parts(engine(runner)) as result:
        for _ in range(3):
            assert runner.step() == [[1]]
        parts = result(1.0)
    assert parts["steps"] == 3
    assert parts["verify"] >= 3 * 0.04 and parts["sample"] >= 3 * 0.01
    assert parts["draft"] >= 3 * 0.03
    named = parts["verify"] + parts["sample"] + parts["draft"]
    assert parts["host"] == pytest.approx(1.0 - named)
    assert vars(runner) == {"model": runner.model} and vars(runner.model) == {}


def test_parts_are_put_back_after_a_failure_and_unknown_where_not_to_be_had():
    runner = Runner()
    with pytest.raises(RuntimeError), timed_parts(engine(runner)):
        raise RuntimeError("in the middle")
    assert vars(runner) == {"model": runner.model}
    with timed_parts(engine(object())) as result:
        assert result(1.0) is None
    with timed_parts(engine(runner, world_size=2)) as result:
        assert result(1.0) is None


def test_counts_are_differences_and_depths_end_at_the_last_accepted():
    before = {"drafts": 2, "accepted": 1, "accepted_by_depth": []}
    after = {"drafts": 7, "accepted": 9, "accepted_by_depth": [5, 3, 0]}
    assert _difference(after, before) == {"drafts": 5, "accepted": 8, "accepted_by_depth": [5, 3]}


def test_requests_and_their_logprobs():
    entry = SimpleNamespace(logprob=-0.5)
    completion = SimpleNamespace(token_ids=[7, 8], logprobs=[{7: entry}, {8: entry}])
    assert _logprobs(completion) == [-0.5, -0.5]
    assert _logprobs(SimpleNamespace(logprobs=None)) is None
    stats = SimpleNamespace(first_token_ts=10.0, last_token_ts=12.5)
    output = SimpleNamespace(outputs=[completion], metrics=stats)
    assert _request(output) == {"tokens": 2, "decode_s": 2.5}
    output.metrics = None
    assert _request(output) == {"tokens": 2, "decode_s": 0.0}


RESULT = {
    "errors": ["", ""],
    "output_lens": [5, 1],
    "ttfts": [0.1, 0.2],
    "latencies": [0.5, 0.2],
    "itls": [[0.1, 0.1], []],
    "duration": 2.0,
    "total_output_tokens": 6,
    "request_goodput": None,
    "generated_texts": ["a", "b"],
}


def test_the_benchmarks_result():
    answer = _answer(
        {
            **RESULT,
            "spec_decode_num_drafts": 10,
            "spec_decode_draft_tokens": 40,
            "spec_decode_accepted_tokens": 12,
            "spec_decode_per_position_acceptance_rates": [0.9, 0.3, 0.0],
        }
    )
    assert answer["latency"]["tpot"] == [pytest.approx(0.1)]
    assert answer["latency"]["itl"] == [0.1, 0.1]
    assert answer["requests"][0] == {"tokens": 5, "decode_s": pytest.approx(0.4)}
    assert answer["spec"]["accepted_by_depth"] == [9, 3]
    assert _answer(RESULT)["spec"]["drafts"] == 0


def test_failed_requests_are_not_measured():
    failed = {**RESULT, "errors": ["", "Traceback ...\nConnectionError: refused"]}
    with pytest.raises(RuntimeError, match=r"1 requests failed, .*refused"):
        _answer(failed)


def test_servers_mend_only_when_told(monkeypatch):
    from vllm_specplugin.vllm import plugin
    from vllm_specplugin.vllm.compat import cpu_sampling_fix

    mended = []
    monkeypatch.setattr(cpu_sampling_fix, "expansion_is_broken", lambda: True)
    monkeypatch.setattr(cpu_sampling_fix, "mend_expansion", lambda: mended.append(1))
    monkeypatch.delenv(MEND, raising=False)
    assert not mending_wanted()
    plugin._mend_if_measuring()
    assert mended == []
    monkeypatch.setenv(MEND, "1")
    plugin._mend_if_measuring()
    assert mended == [1]
