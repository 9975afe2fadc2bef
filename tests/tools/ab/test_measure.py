"""The order of runs, what is counted, and what happens when something fails, with
engines that answer at once."""

from __future__ import annotations

import pytest

from vllm_specplugin.tools.ab import measure as module
from vllm_specplugin.tools.ab.measure import Plan, measure, steps_of
from vllm_specplugin.tools.ab.prompts import PromptSet
from vllm_specplugin.tools.ab.records import Cell, Record, cause
from vllm_specplugin.tools.ab.report import build_report
from vllm_specplugin.tools.ab.variants import parse_variants
from vllm_specplugin.tools.prompt_files import PromptFileError

from .fakes import Bar, FakeEngine, dies

CELLS = [Cell(batch=1), Cell(batch=2, temperature=1.0)]
PROMPTS = PromptSet("file.txt", ["aaa", "bbb", "ccc", "ddd"])


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(module, "EngineProcess", FakeEngine)
    monkeypatch.setattr(FakeEngine, "log", [])
    monkeypatch.setattr(FakeEngine, "behave", {})
    monkeypatch.setattr(FakeEngine, "speed", {})


def planned(*specs: str, **changes) -> Plan:
    values = {"rounds": 3, "max_tokens": 8, **changes}
    variants = parse_variants(specs)
    return Plan(model="m", variants=variants, cells=CELLS, prompts=PROMPTS, **values)


def run(plan: Plan) -> tuple[Record, Bar]:
    record, bar = Record(plan.variants, plan.cells), Bar()
    measure(plan, record, bar)
    return record, bar


def timed() -> list[tuple[str, dict]]:
    """Measurements after warming up and before examining."""
    return [
        (name, request)
        for name, do, request in FakeEngine.log
        if do == "measure" and request["params"][0]["max_tokens"] == 8 and not request["parts"]
    ]


def test_rounds_are_interleaved_and_who_goes_first_changes():
    run(planned("baseline", "vllm:ngram", "suffix+rejection"))
    order = [name for name, _ in timed()]
    assert order[:6] == ["baseline", "vllm:ngram", "suffix+rejection"] * 2  # two cells
    assert order[6:9] == ["vllm:ngram", "suffix+rejection", "baseline"]
    assert order[12:15] == ["suffix+rejection", "baseline", "vllm:ngram"]
    assert len(order) == 3 * 2 * 3


def test_all_get_the_same_prompts_and_seeds_and_each_round_new_ones():
    run(planned("baseline", "suffix+rejection"))
    runs = timed()
    for (_, one), (_, two) in zip(runs[::2], runs[1::2]):
        assert one == two
    batch_of_one = [request["prompts"] for _, request in runs[::4]]
    assert batch_of_one == [[[97] * 3], [[98] * 3], [[99] * 3]]
    of_two = runs[2][1]
    assert [p["seed"] for p in of_two["params"]] == [1000, 1001]
    assert all(p["ignore_eos"] for p in of_two["params"])
    assert [p["temperature"] for p in of_two["params"]] == [1.0, 1.0]
    assert of_two["fill"] is True


def test_ours_forgets_before_every_run_and_gets_its_settings_back():
    run(planned("baseline", 'suffix:{"proposer": {"max_match": 8}}'))
    ours = [(do, r) for name, do, r in FakeEngine.log if name == "suffix"]
    for (do, _), (after, _) in zip(ours[1:], ours[2:]):
        if after == "measure":
            assert do == "reset"
    changes = [r["changes"] for do, r in ours if do == "reset"]
    own = {"proposer": "suffix", "policy": "goodput", "options": {"proposer": {"max_match": 8}}}
    assert changes.count(own) == 2 + 3 * 2 + 2
    assert [c["proposer"] for c in changes if c != own] == ["none", "none"]
    assert not any(do == "reset" for name, do, _ in FakeEngine.log if name == "baseline")


def test_tokens_are_counted_in_what_comes_out_and_warming_up_is_not():
    FakeEngine.speed = {"suffix": 150.0}
    record, bar = run(planned("baseline", "suffix"))
    assert len(record.runs) == 2 * 2 * 3
    assert {r["tokens"] for r in record.runs if r["cell"] == "batch 1, T=0"} == {8}
    speeds = {r["variant"]: r["speed"] for r in record.runs}
    assert speeds == {"baseline": pytest.approx(100), "suffix": pytest.approx(150)}
    assert bar.n == bar.total == steps_of(planned("baseline", "suffix")) == 2 * 2 * 5
    assert "round 2, batch 1, T=0: suffix" in bar.said


def test_a_variant_that_dies_is_a_row_with_its_cause():
    FakeEngine.behave = {"suffix": dies(at=5)}  # two warm-ups, then the third run
    record, _ = run(planned("baseline", "suffix", "vllm:ngram"))
    assert record.errors["suffix"].startswith("in round 2, batch 1, T=0: engine 'x'")
    assert [r["variant"] for r in record.runs].count("suffix") == 2
    assert [r["variant"] for r in record.runs].count("vllm:ngram") == 6
    report = build_report(record, PROMPTS, {}, confidence=0.99)
    failed = report["variants"][1]
    assert "ended with code 3" in failed["error"]
    assert [row["variant"] for row in report["cells"][0]["rows"]] == [
        "baseline",
        "suffix",
        "vllm:ngram",
    ]


def test_interruption_keeps_what_was_measured_and_ends_engines_at_once():
    def interrupt(number: int) -> None:
        if number == 5:  # round 2, where it goes first
            raise KeyboardInterrupt

    FakeEngine.behave = {"suffix": interrupt}
    plan = planned("baseline", "suffix")
    record = Record(plan.variants, plan.cells)
    with pytest.raises(KeyboardInterrupt):
        measure(plan, record, Bar())
    record.interrupted = True
    report = build_report(record, PROMPTS, plan.describe(), confidence=0.99)
    assert report["interrupted"]
    assert len(record.runs) == 2 * 2
    assert [row["rounds"] for row in report["cells"][0]["rows"]] == [1, 1]


def test_a_prompt_too_long_for_the_model_stops_before_anything_is_measured():
    with pytest.raises(PromptFileError, match=r"prompt 1 of file\.txt has 3 tokens"):
        run(planned("baseline", "suffix", max_tokens=510))
    assert not any(do == "measure" for _, do, _ in FakeEngine.log)


def test_the_packages_own_prompts_are_cut_to_length():
    prompts = PromptSet("builtin:code", ["abcdefgh"] * 4)
    plan = Plan("m", parse_variants(["suffix"]), CELLS, prompts, 1, 8, prompt_tokens=5)
    record, _ = run(plan)
    assert record.prompt_tokens == [5] * 4


def test_engine_settings_are_the_same_but_for_what_the_variant_says():
    started = {}

    class Watched(FakeEngine):
        def __init__(self, name, settings, **rest):
            super().__init__(name, settings, **rest)
            started[name] = settings

    module.EngineProcess = Watched
    plan = planned("baseline", "vllm:ngram", "suffix", engine={"dtype": "float32"}, prefill=True)
    run(plan)
    engines = {name: dict(s["engine"]) for name, s in started.items()}
    assert engines["vllm:ngram"].pop("speculative_config")["method"] == "ngram"
    assert engines["baseline"] == engines["vllm:ngram"] == engines["suffix"]
    assert engines["baseline"]["enable_prefix_caching"] is False
    assert engines["baseline"]["gpu_memory_utilization"] == pytest.approx(0.283)
    assert [s["mend"] for s in started.values()] == [False, True, False]
    assert started["suffix"]["speculate"]["proposer"] == "suffix"
    assert not timed()[0][1]["fill"]


def test_repaired_and_relaxed_and_undrafted_are_recorded():
    record, _ = run(planned("baseline", "vllm:ngram", "suffix+typical", "suffix"))
    assert record.repaired == {"vllm:ngram"}
    assert record.relaxed == {("suffix+typical", c.label): 0.25 for c in CELLS}
    assert set(record.undrafted) == {
        (name, c.label) for name in ("suffix+typical", "suffix") for c in CELLS
    }
    assert len(record.logprobs) == 4 * 2
    assert record.parts["baseline", "batch 1, T=0"]["tokens"] == 8


def test_of_a_long_cause_both_ends_are_kept():
    text = cause(RuntimeError("code 3\n" + "x" * 5000 + "the reason"))
    assert text.startswith("code 3\n...\n") and text.endswith("the reason")
    assert len(text) < 2100
    assert Cell(rate=2.5, temperature=1.0).label == "2.5 requests/s, T=1"
    assert Cell(concurrency=4).to_dict() == {"concurrency": 4, "temperature": 0.0}
