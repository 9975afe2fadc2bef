"""Rounds: everybody decodes the same, in turns, and the time is kept."""

from __future__ import annotations

from itertools import groupby

import pytest

from examples.demo.rounds import PLAIN, Out, Round, Run, Table, Watch, affordable_tokens
from tests.examples.demo.fakes import WAYS, FakeDecoding, Time

PROMPTS = [[number, 1, 2] for number in range(40)]


def played(
    engine: FakeDecoding, time: Time, seconds: float = 60, watch: Watch = lambda now, way: None
) -> list[Round]:
    table = Table(engine, PROMPTS, WAYS, time.clock(seconds), watch)
    table.warm_up()
    return list(table.rounds())


def test_all_ways_decode_the_same_prompt_with_the_same_seed() -> None:
    time = Time()
    engine = FakeDecoding(time)
    rounds = played(engine, time)
    for begun in zip(*[iter(engine.begun)] * len(WAYS)):
        assert sorted(proposer for proposer, _ in begun) == ["draft_model", "none", "suffix"]
        requests = [request for _, request in begun]
        assert requests[0] == requests[1] == requests[2]
    assert len({tuple(r["prompt"]) for _, r in engine.begun[6:]}) == min(len(rounds), 40)
    for one in rounds:
        texts = [run.tokens for run in one.runs.values()]
        assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 0


def test_temperatures_alternate_and_everybody_is_first_in_turn() -> None:
    time = Time()
    engine = FakeDecoding(time)
    rounds = played(engine, time)
    assert [one.temperature for one in rounds[:4]] == [0.0, 1.0, 0.0, 1.0]
    # The warm-up, two rounds, is before the first.
    firsts = [proposer for proposer, _ in engine.begun[6::3]]
    assert firsts[:6] == ["none", "none", "suffix", "suffix", "draft_model", "draft_model"]


@pytest.mark.parametrize("seconds", [8.0, 31.0, 86.0])
def test_the_time_is_kept_and_used(seconds: float) -> None:
    time = Time()
    rounds = played(FakeDecoding(time), time, seconds)
    assert seconds - 4 < time.now <= seconds
    assert len(rounds) >= 6


def test_a_machine_that_turns_slow_costs_the_round_not_the_time() -> None:
    time = Time()
    engine = FakeDecoding(time, slow=lambda run, proposer: 1.0 if run < 30 else 500.0)
    rounds = played(engine, time, 60)
    assert time.now < 66  # one token of a slow engine takes five seconds
    assert all(run.finished for one in rounds for run in one.runs.values())
    assert len(rounds) == (29 - 6) // 3


def test_no_time_no_round() -> None:
    time = Time()
    with pytest.raises(Out):
        played(FakeDecoding(time), time, 0.2)


def test_a_slow_engine_decodes_less_in_each_round() -> None:
    def warm(seconds: float) -> Round:
        run = Run(tokens=[1] * 20, steps=20, seconds=seconds, finished=True)
        return Round(-1, 1.0, {PLAIN: run, "suffix": run})

    assert affordable_tokens(warm(0.2), left=60, spent=0.6) == 96
    assert affordable_tokens(warm(1.0), left=60, spent=2.0) in (29, 30)
    assert affordable_tokens(warm(9.0), left=60, spent=20) == 24


def test_what_is_watched_is_what_is_decoded() -> None:
    time = Time()
    seen: list[tuple[int, str, int]] = []

    def watch(now: Round, way: str) -> None:
        seen.append((now.number, way, len(now.runs[way].tokens)))

    rounds = played(FakeDecoding(time), time, 30, watch)
    last = {key: [n for *_, n in found][-1] for key, found in groupby(seen, lambda s: s[:2])}
    for one in rounds:
        for way, run in one.runs.items():
            assert last[one.number, way] == len(run.tokens)
