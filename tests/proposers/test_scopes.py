"""What one scope wrote is never drafted for another, and always for itself."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplugin import PROPOSERS
from vllm_specplugin.api import ProposeContext, RequestView
from vllm_specplugin.config import parse_options
from vllm_specplugin.proposers import token_recycling
from vllm_specplugin.proposers._history import index_numba as indexing
from vllm_specplugin.proposers._history.drafter import scope_code
from vllm_specplugin.testing import engine_info, request

ENGINE = engine_info(vocab_size=500, max_nodes=8)
SECRET = list(range(100, 140))
ASKING = SECRET[:20]


def make(name: str, **options):
    factory = PROPOSERS.get(name)
    return factory(parse_options(factory.Config, options, name), ENGINE)


def view(req_id: str, tokens, scope: str | None, temperature=0.0) -> RequestView:
    return request(
        req_id, tokens, max_nodes=8, max_depth=8, temperature=temperature, seed=3, scope=scope
    )


def serve(proposer, req_id: str, text, scope: str | None) -> None:
    """A request that ends with a text."""
    proposer.propose(ProposeContext(requests=[view(req_id, text, scope)]))
    if scope is not None and (wanted := proposer.needs.top_tokens):
        rows = np.array(text[:-1], np.int32)
        emitted = np.array(text[1:], np.int32)
        top = np.full((len(rows), wanted), -1, np.int32)
        top[:, 0] = emitted
        proposer.observe_rows(rows, top, emitted, scope=scope)
    proposer.release([req_id])


def drafted(proposer, scope: str | None, tokens=ASKING, temperature=0.0) -> set[int]:
    """Tokens drafted for a request that has begun like the secret."""
    asked = [view("asks", tokens, scope, temperature)]
    (tree,) = proposer.propose(ProposeContext(requests=asked))
    proposer.release(["asks"])
    return set(tree.tokens.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("owner", ["", "alice", None])
@pytest.mark.parametrize("name", ["suffix", "token_recycling", "fused"])
def test_only_the_same_scope_is_drafted_for(name, owner, temperature) -> None:
    for asker in ("", "alice", "bob", None):
        proposer = make(name)
        serve(proposer, "secret", SECRET, owner)
        leaked = drafted(proposer, asker, temperature=temperature) & set(SECRET[20:])
        assert bool(leaked) == (asker == owner and owner is not None)


def test_a_request_has_its_own_text_whatever_its_scope() -> None:
    for scope in ("", "bob", None):
        assert SECRET[20] in drafted(make("suffix"), scope, [*SECRET, *ASKING])


def test_the_store_is_shared_and_the_oldest_text_goes_first() -> None:
    proposer = make("suffix", store_tokens=1024)
    size = len(proposer._drafter._index.text)
    serve(proposer, "secret", SECRET, "alice")
    for i in range(200):  # no bound on the number of scopes, one on memory
        serve(proposer, f"r{i}", [300 + i] * 100, f"scope {i}")
    assert drafted(proposer, "alice") == set()
    assert drafted(proposer, "scope 199", [499] * 3) == {499}
    assert len(proposer._drafter._index.text) == size


def test_renumbering_keeps_scopes(monkeypatch) -> None:
    limit = "vllm_specplugin.proposers._history.drafter._LAST_POSITION"
    proposer = make("suffix", store_tokens=1024)
    serve(proposer, "secret", SECRET, "alice")
    monkeypatch.setattr(limit, 10)
    serve(proposer, "other", [7, 8, 9], "bob")
    assert proposer._drafter._index.ends[0] > 1000  # the whole store, written anew
    assert SECRET[20] in drafted(proposer, "alice")
    assert drafted(proposer, "bob") == drafted(proposer, "") == set()


def test_buckets_that_collide_do_not_leak(monkeypatch) -> None:
    # All contexts of all scopes in one chain: the comparison has to tell them apart.
    proposer = make("suffix", store_tokens=1024)
    serve(proposer, "secret", SECRET, "alice")
    index = proposer._drafter._index
    index.heads[:, :1024] = len(ASKING)  # position of its last token
    found = np.empty((2, 8), np.int32)
    context = np.array(ASKING[::-1], np.int32)
    for scope, count in (("alice", 1), ("bob", 0), ("", 0)):
        n = indexing.collect(index, 0, context, len(context), 1, 32, 8, *found, scope_code(scope))
        assert n == count


def test_matrices_are_few_and_a_place_changes_hands_late(monkeypatch) -> None:
    monkeypatch.setattr(token_recycling, "IDLE", 10)
    proposer = make("token_recycling", scopes=2)
    serve(proposer, "a", SECRET, "alice")
    serve(proposer, "b", SECRET, "bob")
    serve(proposer, "c", SECRET, "carol")
    assert drafted(proposer, "alice") and drafted(proposer, "bob")
    assert drafted(proposer, "carol") == set()
    for _ in range(20):
        assert drafted(proposer, "bob")
    serve(proposer, "c", SECRET, "carol")  # in the place of alice
    assert drafted(proposer, "carol") and drafted(proposer, "bob")
    assert drafted(proposer, "alice") == set()
    assert len(proposer._scoped) == 2
    assert drafted(make("token_recycling", scopes=0), "alice") == set()


def test_a_place_is_emptied_before_it_changes_hands(monkeypatch) -> None:
    monkeypatch.setattr(token_recycling, "IDLE", 0)
    proposer = make("token_recycling", scopes=1)
    serve(proposer, "a", SECRET, "alice")
    assert drafted(proposer, "bob") == set()
