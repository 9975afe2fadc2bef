"""Proposers for tests, chosen per request, so that one engine serves them all."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from spec_heads import CheckedMedusa

from vllm_specplugin import EMPTY_TREE, PROPOSERS, DraftTree
from vllm_specplugin.api import EngineInfo, Needs, ProposeContext, ProposerBase, RequestView
from vllm_specplugin.config import parse_options
from vllm_specplugin.trees.draft_probs import DraftProbs

# A request's `extra_args`: {"use": name, "oracle": [its true output]}.


MODELS = Path(__file__).parents[3] / "examples" / "models"
REAL = {
    "ngram": {},
    "suffix": {},
    "token_recycling": {},
    "medusa": {"model": str(MODELS / "medusa"), "min_survival": 0.01},
    "fused": {},
}


class Switch(ProposerBase):
    """Hands each request to the proposer that its options name."""

    def __init__(self, config: None, engine: EngineInfo) -> None:
        self._rng = np.random.default_rng(0)
        self._engine = engine
        self._slept = False
        self._real = {}
        for name, values in REAL.items():
            factory = CheckedMedusa if name == "medusa" else PROPOSERS.get(name)
            options = parse_options(factory.Config, values, name)
            self._real[name] = factory(options, engine)
        top = max(p.needs.top_tokens for p in self._real.values())
        self.needs = Needs(top_tokens=top, hidden=True, lm_head=True)

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        trees: dict[str, DraftTree] = {}
        for name, proposer in self._real.items():
            chosen = [i for i, r in enumerate(ctx.requests) if r.options.get("use") == name]
            if chosen:
                views = [ctx.requests[i] for i in chosen]
                target = ctx.target and ctx.target.take(chosen)
                ctx_of = ProposeContext(requests=views, target=target)
                drafted = proposer.propose(ctx_of)
                trees |= {r.req_id: t for r, t in zip(views, drafted)}
        for request in ctx.requests:
            if request.req_id not in trees:
                trees[request.req_id] = self._by_hand(request)
        return [trees[r.req_id] for r in ctx.requests]

    def observe_rows(self, tokens, top, emitted, scope) -> None:
        for proposer in self._real.values():
            if wanted := proposer.needs.top_tokens:
                proposer.observe_rows(tokens, top[:, :wanted], emitted, scope)

    def release(self, req_ids: Sequence[str]) -> None:
        for proposer in self._real.values():
            proposer.release(req_ids)

    def _by_hand(self, request: RequestView) -> DraftTree:
        use = request.options.get("use", "none")
        n = request.max_nodes
        match use:
            case "none":
                return EMPTY_TREE
            case "raise":
                raise RuntimeError("this proposer always raises")
            case "cycle":
                return DraftTree([5, 6], [1, 0])
            case "unknown_parent":
                return DraftTree([5], [3])
            case "too_many":
                return DraftTree([5] * (n + 1), [-1] * (n + 1))
            case "no_list":
                return None  # type: ignore[return-value]
            case "not_finite":
                return DraftTree([5, 6], [-1, 0], [np.nan, np.inf])
            case "memory":
                raise MemoryError("the store is full")
            case "exit":
                raise KeyError("a key that is not there")
            case "vocabulary":
                return DraftTree([self._engine.vocab_size], [-1])
            case "not_a_tree":
                return "tree"  # type: ignore[return-value]
            case "slow":
                if not self._slept:  # longer than the engines' limit, but once
                    time.sleep(3.2)
                    self._slept = True
                return DraftTree([5], [-1])
            case "ten_times":
                time.sleep(0.25)  # for each of two requests
                return DraftTree([5], [-1])
            case "drawn":
                return self._drawn(request, n)
            case "random" | "oracle":
                return self._random(request, n)
        raise AssertionError(use)

    def _drawn(self, request: RequestView, n: int) -> DraftTree:
        """A tree of up to six nodes drawn from a known q over a few tokens: two
        children without replacement, the first with two more below it."""
        alphabet = request.options["alphabet"]
        q = np.zeros((1, self._engine.vocab_size), dtype=np.float32)
        q[0, alphabet] = np.arange(1, len(alphabet) + 1)
        q /= q.sum()
        parents = [-1, 0, -1, 1, 0, 1][:n]
        tokens: list[int] = []
        for node, parent in enumerate(parents):
            law = q[0, alphabet].astype(float)
            for sibling in range(node):
                if parents[sibling] == parent:
                    law[alphabet.index(tokens[sibling])] = 0
            tokens.append(int(self._rng.choice(alphabet, p=law / law.sum())))
        rows, drawn = np.zeros(len(parents) + 1, np.int32), np.ones(len(parents), bool)
        tree = DraftTree(tokens, parents, None, DraftProbs(q, rows, drawn))
        return tree.prefix(request.max_nodes)

    def _random(self, request: RequestView, n: int) -> DraftTree:
        """A random recursive tree; with an oracle, the true continuation lies on
        the path to a random node, so any wrong mask, position or cache row
        changes what is emitted."""
        n = int(self._rng.integers(1, n + 1))
        parents = [int(self._rng.integers(-1, i)) for i in range(n)]
        tokens = self._rng.integers(3, self._engine.vocab_size, n)
        if (truth := request.options.get("oracle")) is not None:
            future = truth[len(request.tokens) - request.num_prompt_tokens :]
            path = DraftTree(tokens, parents).path(int(self._rng.integers(0, n)))
            for node, token in zip(path, future):
                tokens[node] = token
        return DraftTree(tokens, parents, self._rng.random(n))


class OnSeveralRanks(Switch):
    """Without those that need the target's lm_head, which takes all ranks."""

    def __init__(self, config: None, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        self.needs = Needs(top_tokens=self.needs.top_tokens)
        if flag := os.environ.get("SPEC_DIVERGE"):
            _diverge(Path(flag))


def _diverge(flag: Path) -> None:
    """From the time a file exists the second rank lays out chains for trees."""
    from vllm.distributed.parallel_state import get_tp_group

    from vllm_specplugin.vllm.runner import bookkeeping

    whole = bookkeeping.scheduled_tree
    if get_tp_group().rank_in_group == 1:
        bookkeeping.scheduled_tree = lambda scheduled, drafted: whole(
            scheduled, None if flag.exists() else drafted
        )
