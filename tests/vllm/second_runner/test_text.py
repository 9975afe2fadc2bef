"""The central claim on vLLM's second runner: text as without speculation.

The text is that of *vLLM's own* engine without speculation, at any temperature:
its sampler keys its noise by seed and position, and the plugin draws with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vllm_specplugin.tools.engine_client import EngineProcess

from .conftest import MAX_MODEL_LEN, ask, texts

Get = Callable[[str], EngineProcess]
GREEDY = slice(0, 5)
LONGEST = 4
Mix = tuple[list[list[int]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def mix(prompts: list[list[int]]) -> Mix:
    """Temperatures 0, 0.7 and 1 in one batch; the last prompt writes on beyond a
    block, in the greedy half as request 4."""
    _, root, block, long, longest = prompts
    pairs = [(prompt, 0.0) for prompt in prompts]
    pairs += [(block, 0.7), (longest, 0.7)]
    pairs += [(root, 1.0), (long, 1.0), (longest, 1.0)]
    params = [
        {"temperature": t, "max_tokens": 14 if prompt is longest else 10} for prompt, t in pairs
    ]
    return [prompt for prompt, _ in pairs], params


@pytest.fixture(scope="session")
def truth(engine: Get, mix: Mix) -> list[list[int]]:
    assert engine("vllm").ask("runner")["second"]
    return texts(ask(engine("vllm"), *mix))


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("sync", "none"),
        ("sync", "oracle"),
        ("sync", "suffix"),
        ("async", "oracle"),
        ("async", "recycling"),
    ],
)
def test_text_is_vllms_own_without_speculation(
    name: str, use: str, engine: Get, mix: Mix, truth: list[list[int]]
) -> None:
    one = engine(name)
    before = one.ask("stats")
    oracle = truth if use == "oracle" else None
    assert texts(ask(one, *mix, use, oracle)) == truth
    after = one.ask("stats")
    assert after["failures"] == {}
    assert after["chains_only"] is None
    if use != "none":
        assert after["nodes"] > before["nodes"], "nothing was drafted: it is void"
    if use == "oracle":
        assert after["accepted"] - before["accepted"] > 40
        assert after["kv_rows_moved"] > before["kv_rows_moved"]


@pytest.fixture(params=["confidence", "batch_size", "goodput"])
def deciding(request: pytest.FixtureRequest, engine: Get) -> Iterator[EngineProcess]:
    """The engine under a policy that decides step by step, a step ahead."""
    one = engine("async")
    own = {"confidence": {"threshold": 0.4}, "batch_size": {"table": [[1, 4, 6], [5, 99, 2]]}}
    options = {"policy": own.get(request.param, {"persist": False})}
    one.ask("reset", changes={"policy": request.param, "options": options})
    yield one
    one.ask("reset", changes={"policy": "fixed", "options": {}})


@pytest.mark.parametrize("use", ["oracle", "recycling", "random"])
def test_nor_does_it_matter_how_many_nodes_are_verified(
    use: str, deciding: EngineProcess, mix: Mix, truth: list[list[int]]
) -> None:
    oracle = truth if use == "oracle" else None
    for _ in range(2):
        assert texts(ask(deciding, *mix, use, oracle)) == truth
    after = deciding.ask("stats")
    assert after["failures"] == {}
    counts = after["verified_by_count"]
    assert sum(count > 0 for count in counts) > 1, "counts do not vary"
    assert sum(counts[1:]) > 0, "nothing was verified"


def test_on_the_device_a_scope_of_its_own_shares_nothing(
    engine: Get, mix: Mix, truth: list[list[int]]
) -> None:
    one = engine("async")
    assert texts(ask(one, *mix, "recycling")) == truth  # the matrix is full
    prompts, params = mix
    apart = [{**p, "extra_args": {"spec_cache_scope": "mine"}} for p in params]
    before = one.ask("stats")["nodes"]
    assert texts(ask(one, prompts, apart, "recycling")) == truth
    assert one.ask("stats")["nodes"] == before
    assert texts(ask(one, *mix, "recycling")) == truth
    assert one.ask("stats")["nodes"] > before


def accepted_share(one: EngineProcess, mix: Mix, truth: list[list[int]], use: str) -> float:
    """Accepted tokens per draft, over the whole mix; the text stays what it is."""
    before = one.ask("stats")
    assert texts(ask(one, *mix, use)) == truth
    after = one.ask("stats")
    assert after["failures"] == before["failures"]
    accepted, drafts = (after[k] - before[k] for k in ("accepted", "drafts"))
    return float(accepted / drafts)


def test_heads_on_the_device_are_as_good_as_on_the_host(
    engine: Get, mix: Mix, truth: list[list[int]]
) -> None:
    """And worse with another row of the target, or noise of another position."""
    one = engine("async")
    host = accepted_share(engine("sync"), mix, truth, "medusa")
    device = accepted_share(one, mix, truth, "medusa")
    one.ask("break", part="hidden")
    try:
        other_row = accepted_share(one, mix, truth, "medusa")
    finally:
        one.ask("break", part=None)
    other_noise = accepted_share(one, mix, truth, "medusa, other noise")
    # On the device the last token of a text is drafted for too, in vain.
    assert device > 0.8 * host
    assert other_row < 0.7 * host
    assert other_noise < 0.7 * host


def test_each_runner_is_what_it_should_be(engine: Get) -> None:
    assert engine("sync").ask("runner") == {
        "second": True,
        "scheduler": "Scheduler",
        "runner": "TreeCPUModelRunner",
    }
    assert engine("async").ask("runner")["scheduler"] == "AsyncScheduler"


@pytest.mark.parametrize("name", ["sync", "async"])
def test_requests_were_preempted(name: str, engine: Get) -> None:
    assert engine(name).ask("preemptions") > 0


@pytest.mark.parametrize("name", ["sync", "async"])
def test_moved_rows_serve_the_prefix_cache(
    name: str, engine: Get, mix: Mix, truth: list[list[int]]
) -> None:
    """A prompt that goes on with its own output reads blocks whose rows came from
    accepted branches."""
    prompt, text = mix[0][LONGEST], truth[LONGEST]
    grown = [[*prompt, *text[:-2]]]
    one, greedy = engine(name), [{"temperature": 0.0, "max_tokens": 2}]
    ask(one, [prompt], [mix[1][LONGEST]], "oracle", [text])
    assert one.ask("cached", prompts=grown)[0] > len(prompt)
    assert texts(ask(one, grown, greedy)) == [text[-2:]]


@pytest.mark.parametrize("name", ["sync", "async"])
def test_the_longest_sequence_ends_where_vllms_does(
    name: str, engine: Get, prompts: list[list[int]]
) -> None:
    prompt = [prompts[-1] + prompts[-2][:32]]
    params = [{"temperature": 1.0, "max_tokens": 50}]
    expected = texts(ask(engine("vllm"), prompt, params))
    assert len(prompt[0]) + len(expected[0]) == MAX_MODEL_LEN
    assert texts(ask(engine(name), prompt, params, "oracle", expected)) == expected


@pytest.mark.parametrize("name", ["sync", "async"])
@pytest.mark.parametrize("part", ["mask", "positions", "compaction"])
def test_each_broken_part_is_caught(
    part: str, name: str, engine: Get, mix: Mix, truth: list[list[int]]
) -> None:
    one = engine(name)
    some = mix[0][GREEDY], mix[1][GREEDY], "oracle", truth[GREEDY]
    one.ask("break", part=part)
    try:
        broken = texts(ask(one, *some))
    finally:
        one.ask("break", part=None)
    assert broken != truth[GREEDY]


def test_a_device_proposer_that_raises_costs_drafts_only(
    engine: Get, mix: Mix, truth: list[list[int]]
) -> None:
    one, some = engine("async"), slice(0, 3)
    before = one.ask("stats")
    got = texts(ask(one, mix[0][some], mix[1][some], "raise"))
    after = one.ask("stats")
    assert got == truth[some]
    assert after["failures"]["proposer_error"] > 0
    assert after["nodes"] == before["nodes"]
