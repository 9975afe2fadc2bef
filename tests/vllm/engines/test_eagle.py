"""``eagle``, ``eagle3`` and ``mtp`` on vLLM: the text never changes, and what a head
computes in the paged cache is what a fresh prefill of target and head computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ENGINES, HERE, MAX_NODES, TARGET, Engine, start
from .drafting_checks import check_broken, check_text_and_logits, check_whole_sizes

sys.path.insert(0, str(HERE / "support"))
import spec_eagle

TOKENS = 24
GROWTH = {"depth": 4, "width": 3, "siblings": 3, "min_survival": 0.0}
_HEAD_BLOCK_BYTES = 2 * 4 * 64 * 4 * 32
# Prompts in chunks beside drafts, room for about three of eight requests.
ARGUMENTS = ENGINES["chunked"] | {
    "kv_cache_memory_bytes": ENGINES["preempting"]["kv_cache_memory_bytes"] + 24 * _HEAD_BLOCK_BYTES
}
CHECKED = {"eagle": "CheckedEagle", "eagle3": "CheckedEagle3", "mtp": "CheckedMtp"}


def starting(method: str, folder: Path) -> Engine:
    options: dict[str, Any] = dict(GROWTH)
    arguments: dict[str, Any] = dict(ARGUMENTS)
    if method == "eagle":
        options["model"] = str(TARGET.parent / "eagle")
    elif method == "eagle3":
        options["model"] = str(spec_eagle.random_head(folder, layers=(1, 3, 4)))
    else:
        spec_eagle.mtp_target(folder)
        arguments["model"] = str(folder)
    spec = {
        "proposer": f"spec_eagle:{CHECKED[method]}",
        "policy": "fixed",
        "max_nodes": MAX_NODES,
        "options": {"proposer": options, "draft_timeout_ms": 60_000.0},
    }
    return start(method, spec, **arguments)


@pytest.fixture(scope="module", params=["eagle", "eagle3", "mtp"])
def drafting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp(request.param)
    with starting(request.param, folder) as one:
        yield one.wait_until_ready()


ACCEPTED = {"eagle": 40, "eagle3": 0, "mtp": 5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_and_same_logits_as_a_fresh_prefill(
    temperature: float, drafting: Engine, prompts: list[list[int]], engine: Callable[[str], Engine]
) -> None:
    before, after = check_text_and_logits(
        drafting, engine("first"), prompts, temperature=temperature, max_tokens=TOKENS, rows=150
    )
    assert after["accepted"] - before["accepted"] >= ACCEPTED[drafting.name]
    assert drafting.ask("preemptions") > 0


@pytest.mark.parametrize("drafting", ["eagle"], indirect=True)
def test_same_where_sizes_of_passes_are_those_of_graphs(
    drafting: Engine, prompts: list[list[int]], engine: Callable[[str], Engine]
) -> None:
    check_whole_sizes(drafting, engine("first"), prompts)


@pytest.mark.parametrize("drafting", ["eagle"], indirect=True)
@pytest.mark.parametrize("part", ["rows", "path", "shift", "features", "positions"])
def test_each_broken_part_is_caught(part: str, drafting: Engine, prompts: list[list[int]]) -> None:
    check_broken(drafting, prompts, "break_heads", part)
