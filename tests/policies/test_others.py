"""The simpler policies, each by its own rule."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin import DraftTree
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.policies.aimd import AimdPolicy
from vllm_specplugin.policies.bandit import BanditPolicy
from vllm_specplugin.policies.batch_size import BatchSizePolicy
from vllm_specplugin.policies.confidence import ConfidencePolicy
from vllm_specplugin.policies.shadow import ShadowPolicy
from vllm_specplugin.testing import step_outcome, trim_context

from .support import ENGINE, budget, chains


def make(cls, **options):
    return cls(cls.Config(**options), ENGINE)


# ----------------------------------------------------------- batch_size


def test_the_table_gives_the_depth():
    made = make(BatchSizePolicy, table=[[1, 1, 3], [2, 2, 1], [3, 8, 0]])
    for requests, depth in [(1, 3), (2, 1)]:
        kept = made.trim(trim_context(chains(*[[0.5] * 4] * requests)))
        assert kept.sum() == requests * depth
        assert budget(made, [7] * requests) == [7] * requests
    assert budget(made, [7] * 3) == [0, 0, 0]
    assert budget(made, [7] * 20) == [0] * 20  # above the last entry it holds on


@pytest.mark.parametrize(
    "table", [[], [[2, 4, 1]], [[1, 4, 1], [6, 8, 1]], [[1, 0, 1]], [[1, 4, -1]], [[1, 4]], [4]]
)
def test_a_bad_table_stops_at_start(table):
    with pytest.raises(ConfigError, match="batch_size options"):
        SpecConfig.from_dict({"policy": "batch_size", "options": {"policy": {"table": table}}})


# ----------------------------------------------------------------- aimd


def test_depth_grows_by_two_and_shrinks_by_one():
    made = make(AimdPolicy)
    trees = chains([0.9] * 20)

    def depth():
        return int(made.trim(trim_context(trees)).sum())

    assert depth() == 5
    made.observe(step_outcome([5], [5], 0.01))
    assert depth() == 7
    made.observe(step_outcome([7], [6], 0.01))
    assert depth() == 6
    made.observe(step_outcome([0], [0], 0.01))  # no draft, no news
    assert depth() == 6
    for _ in range(20):
        made.observe(step_outcome([6], [0], 0.01))
    assert depth() == 1
    made.release(["0"])
    assert depth() == 5


def test_a_tree_is_fully_accepted_when_its_depth_is():
    made = make(AimdPolicy, start=2)
    made.observe(step_outcome([6], [2], 0.01, deepest=[2]))
    assert made.trim(trim_context(chains([0.9] * 20))).sum() == 4


# ----------------------------------------------------------- confidence


def test_survival_and_token_rules():
    trees = [DraftTree([1, 2, 3, 4], [-1, 0, 1, -1], [0.8, 0.5, 0.9, 0.1])]
    made = make(ConfidencePolicy, rule="survival", threshold=0.38)
    assert made.trim(trim_context(trees)).tolist() == [True, True, False, False]
    made = make(ConfidencePolicy, rule="token", threshold=0.6)
    # The third is sure of itself, but nobody follows its parent.
    assert made.trim(trim_context(trees)).tolist() == [True, False, False, False]


def test_entropy_rules_stop_where_the_draft_does_not_know():
    trees = chains([0.99, 0.5])
    doubt = -(0.5 * np.log(0.5) * 2)
    for rule, weight in [("svip", 0.15), ("adaedl", 0.2)]:
        edge = np.sqrt(weight * doubt)
        edge = 1 - edge if rule == "adaedl" else edge
        for shift, kept in [(-1e-6, True), (1e-6, False)]:
            threshold = edge + shift * (1 if rule == "adaedl" else -1)
            made = make(ConfidencePolicy, rule=rule, threshold=threshold)
            assert made.trim(trim_context(trees)).tolist() == [True, kept]


def test_entropy_counts_all_drafted_siblings():
    # Two children with .5 each: ln 2; one with .5 and the rest unknown: the same.
    both = [DraftTree([1, 2], [-1, -1], [0.5, 0.5])]
    edge = np.sqrt(0.15 * np.log(2)) + 1e-6
    made = make(ConfidencePolicy, rule="svip", threshold=edge)
    assert made.trim(trim_context(both)).all()
    three = [DraftTree([1, 2, 3], [-1] * 3, [0.34, 0.33, 0.33])]
    assert not made.trim(trim_context(three)).any()


def test_adaedl_moves_its_threshold_towards_the_target():
    made = make(ConfidencePolicy, rule="adaedl", threshold=0.5)
    for _ in range(100):
        made.observe(step_outcome([4], [0], 0.01))
    assert made._threshold > 0.55
    for _ in range(300):
        made.observe(step_outcome([4], [4], 0.01))
    assert made._threshold < 0.5


# --------------------------------------------------------------- bandit


@pytest.mark.parametrize(("accepted", "expected"), [(0.0, 0), (0.9, 8)])
def test_the_bandit_finds_the_best_arm(accepted, expected):
    made = make(BanditPolicy)
    rng = np.random.default_rng(0)
    for _ in range(1500):
        nodes = budget(made, [32] * 2)[0]
        kept = made.trim(trim_context(chains(*[[0.9] * 32] * 2)))
        assert kept.sum() == 2 * nodes
        right = [int(np.argmin(np.append(rng.random(nodes) < accepted, False)))
                 for _ in range(2)]  # fmt: skip
        made.observe(step_outcome([nodes] * 2, right, 0.02 + 0.001 * 2 * nodes))
    favourite = made.snapshot()["nodes_by_log2_batch"][1]
    assert favourite == 0 if expected == 0 else favourite in (4, 8, 16)


# --------------------------------------------------------------- shadow


def test_the_shadow_keeps_nothing_and_the_sweep_anything():
    trees = chains([0.9] * 16)
    assert not make(ShadowPolicy).trim(trim_context(trees)).any()
    sweep = make(ShadowPolicy, sweep=True)
    sizes = {int(sweep.trim(trim_context(trees)).sum()) for _ in range(300)}
    assert min(sizes) == 0 and max(sizes) >= 14 and len(sizes) > 8
