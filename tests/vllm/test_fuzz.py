"""The fuzzer on real engines: a seeded part of what campaigns run, and its power to
find bugs that are planted."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from vllm_specplugin.fuzz.campaign import Plan, campaign
from vllm_specplugin.fuzz.generate import make_workload
from vllm_specplugin.fuzz.session import Session, start_engine
from vllm_specplugin.fuzz.workload import Frame

SUPPORT = Path(__file__).parent / "support"
BREAKABLE = functools.partial(start_engine, module="fuzz_child", path=str(SUPPORT))


def test_no_workload_changes_its_text() -> None:
    plan = Plan(seed=26, workloads=60, runner="v1", per_frame=30)
    coverage, failures = campaign(plan)
    assert [failure.describe() for failure in failures] == []
    counts = coverage.counts
    assert counts["workloads"]["on v1"] == 60
    assert counts["scheduler"]["preemptions"] > 0
    assert counts["scheduler"]["chunks beside drafts"] > 0
    assert counts["requests"]["aborted"] > 0
    assert counts["drafts"]["cache rows moved"] > 50
    assert counts["drafts"]["nodes accepted"] > 300
    assert counts["drafts"]["contained: malformed_tree"] > 0


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


@pytest.mark.parametrize(
    ("bug", "within"), [("mask", 5), ("positions", 5), ("deep moves", 10), ("stop", 15)]
)
def test_planted_bugs_are_found(bug: str, within: int) -> None:
    with Session(FRAME, BREAKABLE) as session:
        session.engine().ask("plant", bug=bug)
        assert any(
            session.judge(make_workload(7, 0, i, FRAME)).failed for i in range(within)
        )
