from __future__ import annotations

import numpy as np

from vllm_specplugin.policies.fixed import FixedPolicy
from vllm_specplugin.testing import trim_context

from .support import ENGINE, budget, chains


def policy(**options) -> FixedPolicy:
    return FixedPolicy(FixedPolicy.Config(**options), ENGINE)


def test_the_limit_wins_over_the_wish():
    assert budget(policy(nodes=4), [10, 2, 0]) == [4, 2, 0]
    assert budget(policy(), [40, 3]) == [32, 3]


def test_without_a_step_limit_everything_is_kept():
    assert policy().trim(trim_context(chains([0.9, 0.1], [0.5]))).all()


def test_a_step_limit_goes_to_the_likeliest_nodes_of_all():
    trees = chains([0.9, 0.9, 0.1], [0.5, 0.8], [0.05])
    kept = policy(step_nodes=3).trim(trim_context(trees))
    assert kept.tolist() == [True, True, False, True, False, False]


def test_the_step_limit_is_optimal_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ctx = trim_context(chains(*(rng.random(rng.integers(1, 5)) for _ in range(3))))
        n = int(rng.integers(1, 6))
        kept = policy(step_nodes=n).trim(ctx)
        assert kept.sum() == min(n, len(ctx.survival))
        best = np.sort(ctx.survival)[::-1][:n].sum()
        assert np.isclose(ctx.survival[kept].sum(), best)
