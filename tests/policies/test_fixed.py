from __future__ import annotations

import numpy as np

from vllm_specplugin.interfaces import BudgetContext, EngineInfo, TrimContext
from vllm_specplugin.policies.fixed import FixedPolicy

ENGINE = EngineInfo(vocab_size=9, max_model_len=9, max_num_seqs=9, max_nodes=16)


def policy(**options) -> FixedPolicy:
    return FixedPolicy(FixedPolicy.Config(**options), ENGINE)


def budget(made, limits):
    n = len(limits)
    return list(
        made.budget(
            BudgetContext(
                req_ids=["r"] * n, limits=limits, num_tokens=[1] * n, options=[{}] * n
            )
        )
    )


def trim(made, survival):
    return list(
        made.trim(
            TrimContext(
                req_ids=["r"] * len(survival),
                survival=[np.array(s, dtype=np.float32) for s in survival],
            )
        )
    )


def test_the_limit_wins_over_the_wish():
    assert budget(policy(nodes=4), [10, 2, 0]) == [4, 2, 0]
    assert budget(policy(), [20, 3]) == [16, 3]


def test_without_a_step_limit_everything_is_kept():
    assert trim(policy(), [[0.9, 0.1], [0.5]]) == [2, 1]


def test_a_step_limit_goes_to_the_likeliest_nodes_of_all():
    made = policy(step_nodes=3)
    assert trim(made, [[0.9, 0.8, 0.1], [0.5, 0.4], [0.05]]) == [2, 1, 0]
    assert trim(made, [[0.9], [0.5]]) == [1, 1]


def test_the_step_limit_is_optimal_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        survival = [np.sort(rng.random(rng.integers(1, 5)))[::-1] for _ in range(3)]
        n = int(rng.integers(1, 6))
        kept = trim(policy(step_nodes=n), survival)
        assert sum(kept) == min(n, sum(map(len, survival)))
        best = np.sort(np.concatenate(survival))[::-1][:n].sum()
        got = sum(s[:k].sum() for s, k in zip(survival, kept))
        assert np.isclose(got, best)
