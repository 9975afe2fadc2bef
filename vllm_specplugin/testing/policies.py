"""The conformance checks of policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import EngineInfo, PolicyBase
from vllm_specplugin.testing._building import expect, maker, plain_data
from vllm_specplugin.testing.builders import (
    budget_context,
    engine_info,
    step_outcome,
    trim_context,
)
from vllm_specplugin.trees.batch import Forest
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["check_policy"]

_TRIALS = 300
"""Trees in which the estimates below a sampled node are changed."""


def check_policy(
    factory: type,
    options: Mapping[str, Any] | None = None,
    *,
    engine: EngineInfo | None = None,
) -> None:
    """Checks that a policy does what the engine relies on.

    - It is built as ``factory(config, engine)``.
    - Each request gets a budget from 0 to its limit.
    - Of the nodes a mask is kept that holds the parent of each kept node.
    - Whether a sampled node is kept does not depend on what follows it.
    - ``rate`` and ``node_price`` are finite and not negative.
    - Unknown ids can be released, and ``snapshot()`` is plain data.

    Args:
        factory: the class.
        options: the operator's options.
        engine: what to build it for; :func:`.engine_info` by default.

    Raises:
        AssertionError: what is wrong, what is expected, and what to do.
        ConfigError: it cannot be built.
    """
    engine = engine or engine_info()
    make = maker(factory, PolicyBase, options, engine)  # type: ignore[type-abstract]
    _steps(make())
    _ignores_what_follows(make)


def _steps(policy: PolicyBase) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        _budgets(policy, [16, 3, 0])
        trees = [_random_tree(rng, 10) for _ in range(3)]
        if any(map(len, trees)):
            _trim(policy, trees)
        policy.observe(step_outcome([int(rng.integers(0, 3))] * 2, 1))
        prices = policy.rate, policy.node_price
        expect(
            all(math.isfinite(price) and price >= 0 for price in prices),
            f"rate and node_price {prices}",
            "finite values that are not negative",
            "set 0 where a value is unknown",
        )
    policy.release(["0", "never seen"])
    plain_data(policy)


def _budgets(policy: PolicyBase, limits: Sequence[int]) -> None:
    budgets = list(policy.budget(budget_context(limits)))
    good = len(budgets) == len(limits) and all(
        0 <= int(budget) <= limit for budget, limit in zip(budgets, limits)
    )
    expect(
        good,
        f"budgets {budgets} for limits {limits}",
        "one for each request, from 0 to its limit",
        "cut each to its limit",
    )


def _trim(
    policy: PolicyBase, trees: Sequence[DraftTree], *, sampled: bool = False
) -> npt.NDArray[np.bool_]:
    keep = policy.trim(trim_context(trees, sampled=sampled))
    nodes = sum(map(len, trees))
    expect(
        isinstance(keep, np.ndarray) and keep.shape == (nodes,) and keep.dtype == np.bool_,
        f"trim() of {nodes} nodes returned {keep!r}",
        f"a boolean array of shape ({nodes},)",
        "return a mask over the nodes",
    )
    expect(
        Forest.of(trees).closed(keep),
        "a kept node whose parent is not kept",
        "a choice that holds the parent of each kept node",
        "choose by survival, or check the parents",
    )
    return keep


def _random_tree(rng: np.random.Generator, most: int) -> DraftTree:
    size = int(rng.integers(0, most))
    parents = [int(rng.integers(-1, node)) for node in range(size)]
    return DraftTree(rng.integers(0, 30, size), parents, rng.random(size))


def _ignores_what_follows(make: Callable[[], PolicyBase]) -> None:
    """The value of a sampled token shows in what is drafted *after* it. Whatever that is,
    whether the token itself is kept must not change."""
    rng = np.random.default_rng(2)
    for _ in range(_TRIALS):
        before, tree, after = (_random_tree(rng, most) for most in (6, 10, 6))
        if not len(tree):
            continue
        node = int(rng.integers(len(tree)))
        below = tree.ancestor_mask()[:, node].copy()
        below[node] = False
        estimates = tree.estimates.copy()
        estimates[below] = rng.random(int(below.sum()))
        kept = []
        for variant in (tree, DraftTree(tree.tokens, tree.parents, estimates)):
            policy = make()
            _budgets(policy, [16, 16, 16])
            for _ in range(6):
                policy.observe(step_outcome([2] * 3, 1, seconds=0.02))
            mask = _trim(policy, [before, variant, after], sampled=True)
            kept.append(bool(mask[len(before) + node]))
        expect(
            kept[0] == kept[1],
            f"node {node} of {tree}, kept or not by the estimates of its descendants",
            "a decision that does not depend on them, as they depend on the token's value",
            "decide by survival, in order, where TrimContext.sampled is set",
        )
