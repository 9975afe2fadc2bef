"""The fuzzer without an engine: generator, judgement, shrinking, campaign."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.adversary import FAULTY, MODES, PATH, Adversary
from tests.fuzz.campaign import Plan, campaign
from tests.fuzz.compare import compare
from tests.fuzz.generate import make_frame, make_workload
from tests.fuzz.leak_check import leaks
from tests.fuzz.shrink import shrink
from tests.fuzz.workload import Case, Frame, Request, Workload
from vllm_specplugin import PROPOSERS
from vllm_specplugin.api import ProposeContext, RequestView
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.testing import engine_info
from vllm_specplugin.testing import request as request_view
from vllm_specplugin.tools.engine_client import EngineError

FRAME = Frame(engine={"max_model_len": 64, "block_size": 32, "max_num_seqs": 4})


class FakeEngine:
    """Its text is the prompt's sum; wrong once drafted for, if ``bug`` says so."""

    def __init__(self, bug: Any = lambda request: False) -> None:
        self._bug = bug

    def ask(self, do: str, **request: Any) -> Any:
        if do != "play":
            return {}
        drafted = request["truth"] is not None
        outputs = [self._output(one, drafted) for one in request["workload"]["requests"]]
        emitted = sum(len(text) for one in outputs for text in one["tokens"])
        return {
            "outputs": outputs,
            "leaks": [],
            "seen": {"preemptions": 1},
            "stats": {
                "nodes": 2,
                "accepted": 1,
                "requests": emitted - 1,
                "emitted": emitted,
                "failures": {},
                "accepted_by_depth": [1],
            },
        }

    def _output(self, one: Mapping[str, Any], drafted: bool) -> dict[str, Any]:
        n = one["params"].get("n", 1)
        token = sum(one["prompt"]) % 4096
        if drafted and self._bug(one):
            token += 1
        most = one["params"]["max_tokens"]
        return {
            "refused": None,
            "aborted": False,
            "cached": 0,
            "tokens": [[token] * most] * n,
            "texts": [""] * n,
            "finish": ["length"] * n,
            "stop": [None] * n,
            "logprobs": [None] * n,
            "prompt_logprobs": None,
        }

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Dead(FakeEngine):
    def ask(self, do: str, **request: Any) -> Any:
        raise EngineError("engine 'fake' ended with code -11: expected an answer")


def cases(count: int = 150) -> list[Case]:
    made = []
    for number in range(count):
        frame = make_frame(5, number, "v2" if number % 4 == 3 else "v1")
        made.append(Case(frame=frame, workload=make_workload(5, number, 0, frame)))
    return made


def test_a_seed_says_all() -> None:
    assert cases(40) == cases(40)
    assert make_workload(5, 0, 0, FRAME) != make_workload(6, 0, 0, FRAME)
    assert make_workload(5, 0, 0, FRAME) != make_workload(5, 0, 1, FRAME)


def test_cases_survive_json() -> None:
    for case in cases():
        assert Case.from_json(case.to_json()) == case


def test_what_is_no_case_is_refused() -> None:
    with pytest.raises(ConfigError, match="a workload that cannot be read"):
        Case.from_json('{"frame": {}}')


PARAMETERS = [
    *("top_k", "top_p", "min_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("logprobs", "prompt_logprobs", "n"),
    "structured_outputs",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
    *("spec_max_nodes", "spec_scorer", "detokenize"),
]
ENGINES = ["scheduling_policy", "enable_lora", "max_num_batched_tokens", "asynchronous"]


def test_every_feature_is_generated() -> None:
    params: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    engines: Counter[str] = Counter()
    for case in cases(400):
        engines.update(list(case.frame.engine))
        engines["asynchronous"] += case.frame.asynchronous
        for request in case.workload.requests:
            params.update(list(request.params))
            params.update(list(request.params.get("extra_args", {})))
            modes[request.mode] += 1
            assert len(request.prompt) > 0 or request.follows is not None
            assert len(request.prompt) < case.frame.max_model_len
    for name in [
        "top_k",
        "top_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logprobs",
        "prompt_logprobs",
        "n",
        "structured_outputs",
        "stop",
        "stop_token_ids",
        "min_tokens",
        "bad_words",
        "allowed_token_ids",
        "min_p",
        "spec_max_nodes",
        "spec_scorer",
        "detokenize",
    ]:
        assert params[name] > 0, name
    for name in ENGINES:
        assert engines[name] > 0, name
    assert set(modes) >= set(MODES) - {"none"}


def view(mode: str, length: int, truth: list[int], nodes: int = 8) -> RequestView:
    return request_view(
        "r",
        range(2, 2 + length),
        max_nodes=nodes,
        max_depth=nodes,
        seed=7,
        options={"fuzz": {"mode": mode, "seed": 1, "first": 7, "truth": [truth]}},
    )


def drafted(mode: str, length: int) -> Any:
    adversary = Adversary(
        None, engine_info(vocab_size=64, max_model_len=99, max_num_seqs=1, max_nodes=8)
    )
    ctx = ProposeContext(requests=[view(mode, length, list(range(20, 40)))])
    return adversary.propose(ctx)[0]


@pytest.mark.parametrize("mode", [m for m in MODES if m not in FAULTY])
def test_drafts_are_sound_and_repeat_themselves(mode: str) -> None:
    for length in range(3, 20):
        tree = drafted(mode, length)
        tree.validate(max_nodes=8, vocab_size=64)
        assert tree == drafted(mode, length)
        future = list(range(20, 40))[length - 3 :]
        if mode in {"chain", "one"}:
            known = min(len(tree), len(future))
            assert tree.tokens[:known].tolist() == future[:known]
        if mode == "siblings":
            assert set(tree.tokens.tolist()) == {future[0]}
            assert set(tree.parents.tolist()) == {-1}
        if mode in {"branch", "twins", "maximum"}:
            assert future[0] in tree.tokens[tree.parents == -1]
        assert (len(tree) == 0) == (mode == "none")


@pytest.mark.parametrize("mode", FAULTY)
def test_faulty_drafts_are_faulty(mode: str) -> None:
    wrong = 0
    for length in range(3, 40):
        try:
            tree = drafted(mode, length)
            tree.validate(max_nodes=8, vocab_size=64)
        except Exception:
            wrong += 1
    assert wrong > 15
    assert "adversary" not in PROPOSERS.names()
    assert PROPOSERS.get(PATH) is Adversary


def play(case: Case, bug: Any = lambda one: False) -> tuple[Any, Any]:
    from tests.fuzz.workload import plain

    engine = FakeEngine(bug)
    work = plain(case.workload)
    return tuple(engine.ask("play", workload=work, truth=t) for t in (None, []))


def a_case(**params: Any) -> Case:
    one = Request(prompt=(5, 6), params={"max_tokens": 4, **params}, mode="branch")
    return Case(frame=FRAME, workload=Workload(requests=(one, one)))


def test_equal_runs_are_right() -> None:
    assert compare(a_case(), *play(a_case())) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[11, 11, 9, 11]]}, "differs from token 2 on: [9, 11]"),
        ({"tokens": [[11, 11]]}, "differs from token 2 on: []"),
        ({"finish": ["stop"]}, "finish of completion 0 is 'stop'"),
        ({"stop": ["e"]}, "stop of completion 0 is 'e'"),
        ({"texts": ["x"]}, "texts of completion 0"),
        ({"refused": "ValueError"}, "refused ValueError"),
        ({"logprobs": [[[[11, -1.0, 1]]]]}, "one of the runs has none"),
    ],
)
def test_each_difference_is_a_problem(change: dict[str, Any], message: str) -> None:
    case = a_case()
    truth, got = play(case)
    got["outputs"][1] = {**got["outputs"][1], **change}
    problems = compare(case, truth, got)
    assert any(message in problem for problem in problems), problems
    assert problems[0].startswith("request 1")


def test_an_aborted_request_has_a_part_of_the_text() -> None:
    case = a_case()
    truth, got = play(case)
    for tokens, wrong in (([11, 11], 0), ([11, 12], 1)):
        got["outputs"][0] |= {"aborted": True, "tokens": [tokens], "finish": [None]}
        problems = [p for p in compare(case, truth, got) if "request 0" in p]
        assert len(problems) == wrong


def test_logprobs_may_be_close_but_not_a_neighbours() -> None:
    case = a_case()
    truth, got = play(case)
    step = [[11, -1.0, 1], [12, -1.5, 2]]
    truth["outputs"][0]["logprobs"] = [[step] * 4]
    for shift, wrong in ((1e-4, 0), (0.1, 1)):
        moved = [[t, logprob + shift, rank] for t, logprob, rank in step]
        got["outputs"][0]["logprobs"] = [[step, moved, step, step]]
        assert len(compare(case, truth, got)) == wrong


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"failures": {"scorer_error": 2}}, "2 failures of kind 'scorer_error'"),
        ({"failures": {"proposer_error": 1}}, "1 failures of kind 'proposer_error'"),
        ({"accepted": 3}, "3 of 2 nodes accepted"),
        ({"emitted": 99}, "99 emitted"),
        ({"accepted_by_depth": [2]}, "accepted by depth"),
    ],
)
def test_counters_must_add_up(stats: dict[str, Any], message: str) -> None:
    case = a_case()
    truth, got = play(case)
    got["stats"] = {**got["stats"], **stats}
    assert any(message in problem for problem in compare(case, truth, got))
    got["stats"] = truth["stats"]
    assert compare(case, truth, {**got, "leaks": ["a leak"]}) == ["a leak"]


def test_lossy_neighbours_are_not_compared() -> None:
    case = a_case(extra_args={"spec_scorer": "rejection"})
    assert compare(case, *play(case, lambda one: True)) == []
    follows = replace(case.workload.requests[0], follows=0, params={"max_tokens": 4})
    both = replace(case.workload, requests=(case.workload.requests[0], follows))
    case = replace(case, workload=both)
    assert compare(case, *play(case, lambda one: True)) == []


def test_a_failure_becomes_small() -> None:
    def bug(one: Mapping[str, Any]) -> bool:
        return 17 in one["prompt"] and one["params"].get("top_k") == 3

    requests = [
        Request(prompt=tuple(range(n)), params={"max_tokens": 9, "logprobs": 1})
        for n in (3, 20, 40)
    ]
    culprit = Request(
        prompt=tuple(range(30)),
        arrival=3,
        params={"max_tokens": 9, "top_k": 3, "logprobs": 2, "n": 2},
        mode="changing",
    )
    whole = Workload(requests=(*requests, culprit, requests[0]))

    def fails(workload: Workload) -> bool:
        case = Case(frame=FRAME, workload=workload)
        return bool(compare(case, *play(case, bug)))

    assert fails(whole)
    small = shrink(whole, fails)
    assert fails(small)
    (left,) = small.requests
    assert left.prompt == (17,)
    assert dict(left.params) == {"max_tokens": 1, "top_k": 3}
    assert (left.arrival, left.mode) == (0, "chain")


def test_shrinking_stops_in_time() -> None:
    ticks = iter(range(100))
    whole = a_case().workload
    tried = []

    def fails(workload: Workload) -> bool:
        tried.append(workload)
        return False

    assert shrink(whole, fails, seconds=5, clock=lambda: next(ticks)) is whole
    assert 0 < len(tried) < 6


def test_requests_that_follow_one_left_out_go_with_it() -> None:
    one = Request(prompt=(5,), params={"max_tokens": 2})
    work = Workload(requests=(one, one, replace(one, follows=1), replace(one, follows=2)))
    seen: list[Workload] = []
    shrink(work, lambda w: bool(seen.append(w)))
    for workload in seen:
        for number, request in enumerate(workload.requests):
            assert request.follows is None or request.follows < number


def test_a_campaign_finds_shrinks_and_counts() -> None:
    plan = Plan(seed=3, workloads=12, runner="both", per_frame=4, most_failures=99)

    def start(frame: Frame, vllm: bool) -> FakeEngine:
        return FakeEngine(lambda one: len(one["prompt"]) > 60)

    coverage, failures = campaign(plan, start=start)
    assert coverage.counts["workloads"]["on v1"] == 8
    assert coverage.counts["workloads"]["on v2"] == 4
    assert coverage.counts["workloads"]["failed"] == len(failures) > 0
    for failure in failures:
        assert len(failure.small.workload.requests) == 1
        assert failure.small_problems
        assert json.loads(json.dumps(failure.describe()))["name"].startswith("seed 3")
    assert "preemptions" in "\n".join(coverage.table())


def test_a_dead_engine_is_a_failure() -> None:
    plan = Plan(seed=3, workloads=1, runner="v1", shrink_seconds=0)
    _, failures = campaign(plan, start=lambda *_: Dead())
    assert "ended with code -11" in failures[0].problems[0]


def test_figures_add_up() -> None:
    plan = Plan(seed=3, workloads=4, runner="v1")
    coverage, _ = campaign(plan, start=lambda *_: FakeEngine())
    figures = coverage.figures()
    coverage.merge(figures)
    assert coverage.counts["workloads"]["on v1"] == 8
    assert coverage.depths[1] == 2 * figures["accepted_by_depth"]["1"]


def test_the_command_reads_reproducers(tmp_path: Path, capsys: Any) -> None:
    broken = tmp_path / "x.json"
    broken.write_text("[]")
    assert main(["--workload", str(broken)]) == 2
    assert "give a file that the fuzzer wrote" in capsys.readouterr().err


class _Slotted:
    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = {"request-7": 1}


def test_what_slots_hold_is_looked_into() -> None:
    scheduler = SimpleNamespace(requests={}, running=[], waiting=[])
    runner = SimpleNamespace(spec=_Slotted())
    assert leaks(scheduler, runner, ["request-7"]) == ["spec.held still knows 'request-7'"]
    assert leaks(scheduler, runner, ["request-8"]) == []
