"""A proposer that wants to change the text: what each request's drafts are like is
written in its own parameters.

It is never registered: a campaign names it by its dotted path. Every choice is keyed
by the request and the length of its text, so that a batch of other requests changes
nothing and a run repeats itself. An oracle (``truth``) holds the text without drafts:
hidden on a branch, it has accepted paths run wherever they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.fuzz.adversary_device import OnDevice
from tests.fuzz.random_trees import random_parents
from vllm_specplugin.api import EngineInfo, ProposeContext, ProposerBase, RequestView
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

__all__ = ["DEVICE_PATH", "FAULTY", "MODES", "PATH", "Adversary", "DeviceAdversary"]

PATH = f"{__name__}:Adversary"
DEVICE_PATH = f"{__name__}:DeviceAdversary"

FAULTY = ("placeholder", "raises", "count", "malformed")
"""Modes whose drafts must be turned down and counted."""
MODES = (
    "none",
    "random",
    "branch",
    "half",
    "twins",
    "siblings",
    "chain",
    "wrong chain",
    "one",
    "maximum",
    "changing",
    *FAULTY,
)
"""How a request is drafted for.

``random`` tree; the truth on a random ``branch`` of one; the truth to ``half`` a
branch, then wrong; the truth on ``twins``, two branches; all ``siblings`` of one
token; the truth as a deep ``chain``; a ``wrong chain``; ``one`` node; the
``maximum`` of nodes; another mode each step (``changing``).
"""
_SOUND = MODES[1 : MODES.index("changing")]

Ints = npt.NDArray[np.int64]
Rng = np.random.Generator


class Adversary(ProposerBase):
    """Drafts for each request as its ``extra_args["fuzz"]`` says."""

    def __init__(self, config: None, engine: EngineInfo) -> None:
        del config
        self._vocab = engine.vocab_size
        self._live: set[str] = set()

    def propose(self, ctx: ProposeContext) -> Sequence[DraftTree]:
        self._live.update(request.req_id for request in ctx.requests)
        trees = [self._draft(request) for request in ctx.requests]
        if any(_asked(r).get("mode") == "count" for r in ctx.requests):
            return trees[1:]
        return trees

    def release(self, req_ids: Sequence[str]) -> None:
        self._live.difference_update(req_ids)

    def _draft(self, request: RequestView) -> DraftTree:
        asked = _asked(request)
        rng = np.random.default_rng([asked.get("seed", 0), len(request.tokens)])
        mode = asked.get("mode", "none")
        if mode == "changing":
            mode = str(rng.choice(_SOUND))
        if mode == "none":
            return EMPTY_TREE
        if mode in FAULTY:
            return self._faulty(mode, request, rng)
        future = _future(request, asked)
        n = int(rng.integers(1, request.max_nodes + 1))
        if mode in {"maximum", "chain", "siblings"}:
            n = request.max_nodes
        tokens = rng.integers(2, self._vocab, n)
        parents = np.arange(-1, n - 1)
        match mode:
            case "one":
                tokens, parents = tokens[:1], parents[:1]
                _write(tokens, [0], future)
            case "chain":
                _write(tokens, list(range(n)), future)
            case "siblings":
                parents = np.full(n, -1)
                tokens[:] = future[0] if future else tokens[0]
            case "wrong chain":
                pass
            case _:
                parents = random_parents(rng, n)
                _hide(mode, tokens, parents, future, rng)
        estimates = (None, rng.random(len(tokens)), np.zeros(len(tokens)))
        return DraftTree(tokens, parents, estimates[int(rng.integers(3))])

    def _faulty(self, mode: str, request: RequestView, rng: Rng) -> DraftTree:
        n = request.max_nodes
        if rng.random() < 0.3 and mode != "count":  # now and then nothing is wrong
            return DraftTree([int(rng.integers(2, self._vocab))], [-1])
        match mode:
            case "raises":
                raise _RAISED[int(rng.integers(len(_RAISED)))]
            case "placeholder":
                bad = (-1, -2, self._vocab, 2**31 - 1, -(2**31), 2**40)
                good = [int(t) for t in rng.integers(2, self._vocab, n)]
                good[int(rng.integers(n))] = bad[int(rng.integers(len(bad)))]
                return DraftTree(good, np.arange(-1, n - 1))
            case "malformed":
                return self._malformed(n, rng)
        return EMPTY_TREE

    def _malformed(self, n: int, rng: Rng) -> DraftTree:
        match int(rng.integers(7)):
            case 0:
                return DraftTree([5, 6], [1, 0])
            case 1:
                return DraftTree([5], [3])
            case 2:
                return DraftTree([5] * (n + 1), [-1] * (n + 1))
            case 3:
                return DraftTree([5], [-1], [float("nan")])
            case 4:
                return DraftTree([5], [-1, 0])
            case 5:
                return "a tree"  # type: ignore[return-value]
        return None  # type: ignore[return-value]


class DeviceAdversary(Adversary):
    """Offers to draft on the device: what asynchronous scheduling takes."""

    def on_device(self, nodes: int, device: Any) -> Any:
        """Its half for asynchronous scheduling; see :mod:`.adversary_device`."""
        return OnDevice(self._vocab, nodes, device)


_RAISED: tuple[Exception, ...] = (
    RuntimeError("raised on purpose"),
    KeyError("raised on purpose"),
    MemoryError(),
    StopIteration(),
    AssertionError(),
    RecursionError(),
)


def _hide(mode: str, tokens: Ints, parents: Ints, future: list[int], rng: Rng) -> None:
    """Puts the truth on a path, or part of it, or on two."""
    if mode == "random":
        return
    tree = DraftTree(tokens, parents)
    path = tree.path(int(rng.integers(0, len(tokens))))
    if mode == "half":
        path = path[: int(rng.integers(0, len(path) + 1))]
    _write(tokens, path, future)
    if mode in {"twins", "maximum"}:
        _write(tokens, tree.path(int(rng.integers(0, len(tokens)))), future)


def _write(tokens: Ints, nodes: list[int], future: list[int]) -> None:
    for node, token in zip(nodes, future):
        tokens[node] = token


def _asked(request: RequestView) -> dict[str, Any]:
    found = request.options.get("fuzz", {})
    return dict(found) if isinstance(found, dict) else {}


def _future(request: RequestView, asked: dict[str, Any]) -> list[int]:
    """What follows without drafts; of several completions that of this one, which
    its seed tells."""
    truth, first = asked.get("truth"), asked.get("first")
    if not truth:
        return []
    index = 0 if first is None else (request.seed - first) & (1 << 64) - 1
    text = truth[index] if index < len(truth) else []
    return list(text[len(request.tokens) - request.num_prompt_tokens :])
