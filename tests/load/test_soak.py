"""The load test itself, for seconds instead of half an hour."""

from __future__ import annotations

from tests.load.soak import Report, _judge, soak
from tests.load.traffic import Answer


def test_answers_under_load_are_those_without_drafts() -> None:
    patient = '--spec-options={"draft_timeout_ms": 60000}'  # the machine may be busy
    report = soak(0.2, 32, ["--spec-proposer=suffix", patient], requests=60)
    assert not report.faults()
    assert report.completed > 10 and report.hung_up > 0
    assert report.metrics["spec_plugin_nodes_accepted_total"] > 0
    assert report.metrics["num_preemptions_total"] > 0


def answer(tokens: list[int], *, finish: str | None = "length") -> Answer:
    return Answer(0, tokens, finish=finish, hung_up=finish is None, used=len(tokens))


def judged(answers: list[Answer], **metrics: float) -> Report:
    report = Report(
        metrics={
            "request_success_total:length": 1.0,
            "generation_tokens_total": 3.0,
            "spec_plugin_tokens_emitted_total": 3.0,
            **metrics,
        }
    )
    _judge(report, answers, [answer([1, 2, 3])], [{"prompt": [9], "max_tokens": 3}])
    return report


def test_what_is_wrong_is_said() -> None:
    assert not judged([answer([1, 2, 3])]).faults()
    assert "different" in judged([answer([1, 2, 4])]).faults()[0]
    assert "different" in judged([answer([1, 2])]).faults()[0]
    begun = answer([1, 2], finish=None)
    assert not judged(
        [answer([1, 2, 3]), begun], generation_tokens_total=5, spec_plugin_tokens_emitted_total=5
    ).faults()
    begun = answer([2], finish=None)
    assert "different" in judged([answer([1, 2, 3]), begun]).faults()[0]
    lost = judged([answer([1, 2, 3])], generation_tokens_total=2).faults()
    assert lost == ["generation_tokens_total: the server says 2, clients 3 to 3"]
    failed = judged([answer([1, 2, 3])], **{"spec_plugin_failures_total:timeout": 1})
    assert "spec_plugin_failures_total" in failed.faults()[0]
