"""The fuzzer on real engines: a seeded part of what campaigns run, and its power to
find bugs that are planted."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.campaign import Plan, campaign
from tests.fuzz.generate import make_workload
from tests.fuzz.session import Session, start_engine
from tests.fuzz.workload import Frame

WITHIN = {
    "mask": 10,
    "positions": 10,
    "compaction": 10,
    "deep moves": 20,
    "cached rows": 60,
    "stop": 40,
    "logprobs": 20,
    "noise": 10,
    "penalties": 40,
    "release": 5,
    "blocks": 40,
}
"""Bugs of ``fuzz_child``, and workloads that are enough to find them."""
SUPPORT = Path(__file__).parent / "support"
BREAKABLE = functools.partial(start_engine, module="fuzz_child", path=str(SUPPORT))


def test_no_workload_changes_its_text() -> None:
    plan = Plan(seed=935, workloads=60, runner="v1")
    coverage, failures = campaign(plan)
    assert [failure.describe() for failure in failures] == []
    counts = coverage.counts
    assert counts["workloads"]["on v1"] == 60
    assert counts["scheduler"]["preemptions"] > 0
    assert counts["scheduler"]["chunks beside drafts"] > 0
    assert counts["requests"]["aborted"] > 0
    assert counts["drafts"]["cache rows moved"] > 50
    assert counts["drafts"]["nodes accepted"] > 300


FRAME = Frame(
    engine={
        "max_model_len": 96,
        "max_num_seqs": 4,
        "block_size": 32,
        "num_gpu_blocks_override": 16,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
    },
    max_nodes=8,
)


@pytest.fixture(scope="module")
def breakable() -> Iterator[Session]:
    with Session(FRAME, BREAKABLE) as session:
        yield session


@pytest.mark.parametrize(("bug", "within"), WITHIN.items())
def test_planted_bugs_are_found(bug: str, within: int, breakable: Session) -> None:
    work = [make_workload(7, 0, i, FRAME) for i in range(within)]
    breakable.engine().ask("plant", bug=bug)
    found = any(breakable.judge(one).failed for one in work)
    breakable.engine().ask("plant", bug=None)
    assert found
    assert breakable.judge(work[0]).problems == []
