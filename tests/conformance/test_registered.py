"""What every registered proposer, scorer and policy must do."""

from __future__ import annotations

import pytest

from tests.proposers.fake_heads import HIDDEN, heads_folder
from vllm_specplugin import POLICIES, PROPOSERS, SCORERS
from vllm_specplugin.testing import check_policy, check_proposer, check_scorer, engine_info

NEEDED = {
    "medusa": {"model": heads_folder()},
    "draft_model": {"model": "m"},
    "eagle": {"model": "m"},
    "eagle3": {"model": "m"},
}
"""Options that a proposer cannot do without."""


@pytest.mark.parametrize("name", PROPOSERS.names())
def test_proposers(name: str) -> None:
    engine = engine_info(hidden_size=HIDDEN)
    check_proposer(PROPOSERS.get(name), NEEDED.get(name), engine=engine)


@pytest.mark.parametrize("name", SCORERS.names())
def test_scorers(name: str) -> None:
    check_scorer(SCORERS.get(name))


@pytest.mark.parametrize("name", POLICIES.names())
def test_policies(name: str) -> None:
    check_policy(POLICIES.get(name))
