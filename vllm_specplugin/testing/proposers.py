"""The conformance checks of proposers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from vllm_specplugin.api import (
    COMMON_SCOPE,
    PRIVATE_SCOPE,
    EngineInfo,
    ProposeContext,
    ProposerBase,
    RequestView,
    Scope,
)
from vllm_specplugin.errors import DraftTreeError, complain
from vllm_specplugin.testing._building import expect, maker, plain_data
from vllm_specplugin.testing.builders import engine_info, propose_context, request
from vllm_specplugin.trees.tree import DraftTree

__all__ = ["check_proposer"]


class _MakesContext(Protocol):
    def __call__(self, *requests: RequestView, engine: EngineInfo) -> ProposeContext: ...


def check_proposer(
    factory: type,
    options: Mapping[str, Any] | None = None,
    *,
    engine: EngineInfo | None = None,
    context: _MakesContext = propose_context,
    batch_independent: bool = True,
) -> None:
    """Checks that a proposer does what the engine relies on.

    - It is built as ``factory(config, engine)``, with no misspelt need.
    - An empty batch gives no trees; a batch gives one valid tree per request, in order.
    - ``max_nodes``, ``max_depth`` and the vocabulary are respected, at temperature 0 and
      above, for a single token and for a full context.
    - The same calls give the same trees, and the requests beside a request do not change
      its tree.
    - Unknown ids can be released, and a released id can be used for another text.
    - Tokens are not written to, and not read after the call.
    - Rows of -1 are no tokens.
    - What one scope wrote is not drafted for another one.
    - ``snapshot()`` is plain data.

    Args:
        factory: the class.
        options: the operator's options.
        engine: what to build it for; :func:`.engine_info` by default. It needs at least
            16 tokens and 64 positions.
        context: makes the batch; for a proposer that needs a model of its own kind.
        batch_independent: whether to check that a tree does not depend on the batch.

    Raises:
        AssertionError: what is wrong, what is expected, and what to do.
        ConfigError: it cannot be built.
    """
    engine = engine or engine_info()
    make = maker(factory, ProposerBase, options, engine)  # type: ignore[type-abstract]
    check = _Checks(make, engine, context)
    check.limits()
    check.repeats()
    if batch_independent:
        check.batches()
    check.releases()
    check.buffers()
    check.rows()
    check.scopes()


def _release(proposer: ProposerBase, req_ids: Sequence[str]) -> None:
    try:
        proposer.release(req_ids)
    except Exception as error:
        raise AssertionError(
            complain(
                f"release() raised {type(error).__name__}: {error}",
                "no error, for unknown ids neither",
                "ignore ids that are not known",
            )
        ) from error


class _Checks:
    def __init__(
        self, make: Callable[[], ProposerBase], engine: EngineInfo, context: _MakesContext
    ) -> None:
        self._make, self._engine, self._context = make, engine, context
        vocab, most = engine.vocab_size, engine.max_model_len
        self._texts = [
            [4],
            [1, 2],
            [5, 6, 7] * min(20, (most - 2) // 3),
            [token % vocab for token in range(min(90, most - 2))],
            [int(t) for t in np.random.default_rng(0).integers(0, vocab, most - 1)],
        ]

    def draft(self, proposer: ProposerBase, *requests: RequestView) -> list[DraftTree]:
        """The checked trees of a batch."""
        try:
            trees = list(proposer.propose(self._context(*requests, engine=self._engine)))
        except Exception as error:
            raise AssertionError(
                complain(
                    f"propose() raised {type(error).__name__}: {error}",
                    "one tree per request",
                    "return EMPTY_TREE where nothing can be drafted",
                )
            ) from error
        expect(
            len(trees) == len(requests),
            f"{len(trees)} trees for {len(requests)} requests",
            "one tree per request",
            "return EMPTY_TREE where nothing can be drafted",
        )
        for view, tree in zip(requests, trees):
            self._check_tree(view, tree)
        return trees

    def _check_tree(self, view: RequestView, tree: DraftTree) -> None:
        expect(
            isinstance(tree, DraftTree),
            f"a {type(tree).__name__} for request {view.req_id!r}",
            "a DraftTree",
            "return EMPTY_TREE for none",
        )
        try:
            DraftTree(tree.tokens, tree.parents, tree.estimates, tree.draft_probs)
            tree.validate(max_nodes=view.max_nodes, vocab_size=self._engine.vocab_size)
        except DraftTreeError as error:
            raise AssertionError(f"request {view.req_id!r}: {error}") from error
        expect(
            tree.max_depth <= view.max_depth,
            f"a tree of depth {tree.max_depth} for request {view.req_id!r}",
            f"at most its max_depth of {view.max_depth}",
            "stop there: deeper nodes cannot be emitted",
        )

    def _batch(self, temperature: float = 1.0, **limits: int) -> list[RequestView]:
        most = self._engine.max_nodes
        full = self._engine.max_model_len - 1
        return [
            request(
                f"{i}-{temperature}-{limits}",
                text,
                temperature=temperature,
                max_nodes=1 if len(text) == full else min(limits.get("max_nodes", most), most),
                max_depth=1 if len(text) == full else limits.get("max_depth", 16),
            )
            for i, text in enumerate(self._texts)
        ]

    def limits(self) -> None:
        for temperature in (0.0, 1.0):
            proposer = self._make()
            self.draft(proposer)
            for nodes, depth in ((64, 16), (1, 16), (64, 1), (5, 3)):
                batch = self._batch(temperature, max_nodes=nodes, max_depth=depth)
                self.draft(proposer, *batch)
                _release(proposer, [view.req_id for view in batch])
            plain_data(proposer)

    def repeats(self) -> None:
        first, second = self._make(), self._make()
        for temperature in (0.0, 1.0):
            batch = self._batch(temperature)
            for _ in range(2):
                expect(
                    self.draft(first, *batch) == self.draft(second, *batch),
                    "two instances whose trees differ after the same calls",
                    "the same trees",
                    "take randomness from RequestView.seed or a generator of fixed seed",
                )

    def batches(self) -> None:
        together, alone = self._make(), self._make()
        batch = self._batch()
        trees = self.draft(together, *batch)
        for view, one in list(zip(batch, trees))[::-1]:
            [other] = self.draft(alone, view)
            same = (one.tokens.tolist(), one.parents.tolist()) == (
                other.tokens.tolist(),
                other.parents.tolist(),
            )
            # Products of one row and of several may round differently.
            expect(
                same and np.allclose(one.estimates, other.estimates, rtol=1e-5, atol=1e-7),
                f"{one} for request {view.req_id!r} in a batch, and {other} alone",
                "the same tree",
                "do not let a request's draft depend on the batch, or check with "
                "batch_independent=False",
            )

    def releases(self) -> None:
        proposer, fresh = self._make(), self._make()
        _release(proposer, ["never seen"])
        self.draft(proposer, request("a", [1, 2, 3] * 10))
        _release(proposer, ["a"])
        _release(proposer, ["a"])
        other = request("a", [10, 11, 12, 13] * 8)  # unlike anything seen before
        expect(
            self.draft(proposer, other) == self.draft(fresh, other),
            "a tree for a reused request id that differs from that of a new proposer",
            "the same tree",
            "forget a request in release()",
        )

    def buffers(self) -> None:
        """Hands out views of a buffer that is overwritten after each call."""
        proposer, fresh = self._make(), self._make()
        text = np.array([5, 6, 7, 8] * 12, dtype=np.int32)
        for end in (20, 21, 25, 40, 48):
            buffer = text.copy()
            view = request("a", text[:end])
            trees = self.draft(proposer, replace(view, tokens=buffer[:end]))
            expect(
                bool((buffer == text).all()),
                "propose() wrote to RequestView.tokens",
                "no write: it is the engine's buffer",
                "copy the tokens before changing them",
            )
            expected = self.draft(fresh, view)
            buffer[:] = 0
            expect(
                trees == expected,
                "a tree that changes if the engine reuses the buffer of earlier tokens",
                "the same tree: RequestView.tokens is valid during the call only",
                "copy the tokens that are kept",
            )

    def rows(self) -> None:
        proposer = self._make()
        if not proposer.needs.top_tokens:
            return
        self._show(proposer, [4, 5, -1, 6, -1], COMMON_SCOPE)
        self.draft(proposer, *self._batch(0.0), *self._batch(1.0))

    def _show(self, proposer: ProposerBase, text: Sequence[int], scope: Scope) -> None:
        """The rows of a text that was read token by token, with padding."""
        if not (wanted := proposer.needs.top_tokens) or scope is None:
            return
        if scope and not proposer.separates_scopes:
            return
        tokens = np.array([*text[:-1], -1], dtype=np.int32)
        emitted = np.array([*text[1:], -1], dtype=np.int32)
        top = np.full((len(tokens), wanted), -1, dtype=np.int32)
        top[:, 0] = emitted
        rows = tokens, top, emitted
        before = [part.copy() for part in rows]
        proposer.observe_rows(*rows, scope=scope)
        expect(
            all((part == old).all() for part, old in zip(rows, before)),
            "observe_rows() wrote to its arguments",
            "no write: they are the engine's buffers",
            "copy them before changing them",
        )

    def scopes(self) -> None:
        half = self._engine.vocab_size // 2
        secret = list(range(1, self._engine.vocab_size))[: 2 * half]
        begun, rest = secret[:half], set(secret[half:])

        def drafted(proposer: ProposerBase, scope: Scope) -> set[int]:
            [tree] = self.draft(proposer, request("asks", begun, scope=scope))
            _release(proposer, ["asks"])
            return set(tree.tokens.tolist()) & rest

        for owner, asker in (
            ("alice", "bob"),
            ("alice", COMMON_SCOPE),
            (COMMON_SCOPE, "alice"),
            (PRIVATE_SCOPE, COMMON_SCOPE),
            (PRIVATE_SCOPE, PRIVATE_SCOPE),
            (COMMON_SCOPE, PRIVATE_SCOPE),
        ):
            proposer = self._make()
            by_itself = drafted(proposer, asker)
            self.draft(proposer, request("writes", secret, scope=owner))
            self._show(proposer, secret, owner)
            _release(proposer, ["writes"])
            leaked = drafted(proposer, asker) - by_itself
            expect(
                not leaked,
                f"tokens {sorted(leaked)} of a text of scope {owner!r} drafted for {asker!r}",
                "none of them: scopes must not learn from each other's tokens",
                "keep what is remembered apart by RequestView.scope",
            )
