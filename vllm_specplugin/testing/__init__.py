"""For the tests of plugins: builders of contexts, and the conformance checks.

The builders make what an engine passes to an algorithm, with a default for everything::

    from vllm_specplugin.testing import propose_context, request

    [tree] = proposer.propose(propose_context(request("a", [1, 2, 3], max_nodes=4)))

:func:`check_proposer`, :func:`check_scorer` and :func:`check_policy` run a class through
everything that the engine relies on. Importing this package imports torch and numba.
"""

from __future__ import annotations

from vllm_specplugin.testing.builders import (
    budget_context,
    engine_info,
    propose_context,
    request,
    score_batch,
    step_outcome,
    trim_context,
)
from vllm_specplugin.testing.fakes import FakeDraftModel, FakeNativeDrafts
from vllm_specplugin.testing.policies import check_policy
from vllm_specplugin.testing.proposers import check_proposer
from vllm_specplugin.testing.scorers import check_scorer

__all__ = [
    "FakeDraftModel",
    "FakeNativeDrafts",
    "budget_context",
    "check_policy",
    "check_proposer",
    "check_scorer",
    "engine_info",
    "propose_context",
    "request",
    "score_batch",
    "step_outcome",
    "trim_context",
]
