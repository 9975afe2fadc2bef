"""``medusa`` on vLLM: the row it reads, and what stops at start.

That the text never changes is in ``test_exactness``, where every row it is shown
is compared with the token that came from it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vllm_specplugin.tools.engine_client import EngineError

from ..conftest import TARGET, Engine, start

HEADS = TARGET.parent / "medusa"


def test_a_wrong_row_is_noticed(engine: Callable[[str], Engine], prompts: list[list[int]]) -> None:
    one = engine("uncached")
    expected = one.texts(prompts, "none", temperature=1.0, max_tokens=16)
    before = one.ask("stats")["failures"].get("proposer_error", 0)
    one.ask("break", part="hidden")
    try:
        got = one.texts(prompts, "medusa", temperature=1.0, max_tokens=16)
    finally:
        one.ask("break", part=None)
    assert got == expected
    assert one.ask("stats")["failures"]["proposer_error"] > before


def test_started_as_an_operator_does_with_heads_and_without() -> None:
    speculate = {
        "proposer": "medusa",
        "policy": "fixed",  # on a busy machine drafting may not pay
        "options": {"proposer": {"model": str(HEADS)}},
    }
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
    with start("wrong heads", speculate, **settings) as one:
        one.wait_until_ready()
        params = [{"temperature": t, "max_tokens": 24, "seed": 3} for t in (0.0, 1.0)]
        one.ask("run", prompts=[[5, 6, 7]] * 2, params=params)
        told = one.ask("stats")
        assert told["accepted"] > 0 and not told["failures"]
    other = {**speculate, "options": {"proposer": {"model": str(HEADS / "nowhere")}}}
    with (
        start("no heads", other, **settings) as one,
        pytest.raises(EngineError, match="no Medusa heads at"),
    ):
        one.wait_until_ready()
