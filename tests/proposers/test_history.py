"""The compiled index and estimates against plain Python."""

import math

import numpy as np
import pytest

from vllm_specplugin.api import RequestView
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.proposers._history import index_numba as indexing
from vllm_specplugin.proposers._history import votes_numba as votes
from vllm_specplugin.proposers._history.drafter import HistoryDrafter
from vllm_specplugin.proposers._history.votes_numba import Rule
from vllm_specplugin.testing import engine_info, request

MASK = 255


def make_index(size: int = MASK + 1) -> indexing.Index:
    """The store and one history, of ``size`` tokens each."""
    orders = len(indexing.ORDERS)
    return indexing.Index(
        text=np.zeros(2 * size, np.int32),
        heads=np.full((orders, 2 * size), -1, np.int32),
        links=np.full((orders, 2 * size), -1, np.int32),
        offsets=np.array([0, size]),
        masks=np.array([size - 1, size - 1]),
        ends=np.zeros(2, np.int64),
        scopes=np.zeros(size, np.int64),
    )


def found(index, slot, context, *, minimum=1, maximum=32, size=4096, enough=None, scope=0):
    """``{position after the match: match length}``."""
    positions, lengths = np.empty(size, np.int32), np.empty(size, np.int32)
    n = indexing.collect(
        index,
        slot,
        np.array([*context[::-1], 0], np.int32),
        len(context),
        minimum,
        maximum,
        enough or size,
        positions,
        lengths,
        scope,
    )
    assert len(set(positions[:n].tolist())) == n
    return dict(zip(positions[:n].tolist(), lengths[:n].tolist(), strict=True))


def shared_suffix(a: list[int], b: list[int], maximum: int) -> int:
    length = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y or x < 0 or length == maximum:
            break
        length += 1
    return length


def naive(text, context, *, first=0, minimum=1, maximum=32):
    """The same by comparing with every position from ``first`` on."""
    return {
        p: n
        for p in range(first + 1, len(text))
        if text[p] >= 0 and (n := shared_suffix(text[first:p], context, maximum)) >= minimum
    }


@pytest.mark.parametrize("alphabet", [1, 2, 5, 40])
@pytest.mark.parametrize(("minimum", "maximum"), [(1, 32), (2, 6), (3, 3), (9, 12)])
def test_finds_every_occurrence_and_its_length(alphabet, minimum, maximum):
    rng = np.random.default_rng(alphabet)
    text = rng.integers(0, alphabet, 200).tolist()
    index = make_index()
    limits = {"minimum": minimum, "maximum": maximum}
    for n in range(1, len(text) + 1):
        indexing.extend(index, 1, np.array(text[n - 1 : n], np.int32))
        if n % 7 == 0:
            context = text[:n][-maximum:]
            assert found(index, 1, context, **limits) == naive(text[:n], context, **limits)
    context = rng.integers(0, alphabet, 5).tolist()  # need not end the text
    assert found(index, 1, context, **limits) == naive(text, context, **limits)


def test_a_full_segment_forgets_its_oldest_tokens():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 3, 1000).tolist()
    index = make_index()
    indexing.extend(index, 1, np.array(text, np.int32))
    first = len(text) - MASK - 1
    assert found(index, 1, text[-9:]) == naive(text, text[-9:], first=first)


def test_nothing_matches_across_a_separator():
    index = make_index()
    indexing.extend(index, 1, np.array([7, 1, 2, 3], np.int32))
    indexing.absorb(index, 1, 0)
    indexing.clear(index, 1)
    indexing.extend(index, 1, np.array([5, 1, 2], np.int32))
    indexing.absorb(index, 1, 0)
    stored = [-1, 7, 1, 2, 3, -1, 5, 1, 2]
    assert index.text[: len(stored)].tolist() == stored
    assert found(index, indexing.STORE, [9, 1, 2]) == {4: 2}
    assert found(index, indexing.STORE, [3, 5]) == {7: 1}


def test_the_most_recent_occurrences_of_the_longest_order_come_first():
    index = make_index()
    indexing.extend(index, 1, np.array([1, 2, 5, 9, 2, 6, 1, 2, 7, 1, 2], np.int32))
    assert list(found(index, 1, [1, 2], size=2)) == [8, 2]
    assert list(found(index, 1, [1, 2])) == [8, 2, 5]
    assert list(found(index, 1, [1, 2], enough=2)) == [8, 2]


def test_added_at_once_or_one_by_one_is_the_same():
    text = np.random.default_rng(1).integers(0, 4, 700).astype(np.int32)
    whole, pieces = make_index(), make_index()
    indexing.extend(whole, 1, text)
    for i in range(0, len(text), 3):
        indexing.extend(pieces, 1, text[i : i + 3])
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)


def interpolate(tokens, matches, weights, escape):
    n = len(tokens)
    candidates, q = np.empty(n, np.int32), np.empty(n)
    found = votes.interpolate(
        np.array(tokens, np.int32),
        np.array(matches, np.int32),
        np.array(weights, np.float64),
        n,
        escape,
        candidates,
        q,
        np.empty(n),
    )
    return dict(zip(candidates[:found].tolist(), q[:found].tolist(), strict=True))


def naive_interpolation(tokens, matches, weights, escape):
    q = dict.fromkeys(tokens, 0.0)
    for level in sorted(set(matches)):
        n = dict.fromkeys(q, 0.0)
        for token, match, weight in zip(tokens, matches, weights, strict=True):
            n[token] += weight * (match >= level)
        e = escape / math.sqrt(level) * sum(v > 0 for v in n.values())
        q = {v: (n[v] + e * q[v]) / (sum(n.values()) + e) for v in q}
    return q


def test_interpolation_is_the_formula():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 20))
        args = (
            rng.integers(0, 5, n).tolist(),
            rng.integers(1, 12, n).tolist(),
            rng.choice([0.5, 1.0], n).tolist(),
            float(rng.uniform(0.1, 3)),
        )
        q = interpolate(*args)
        assert q == pytest.approx(naive_interpolation(*args))
        assert 0 < sum(q.values()) < 1


def test_longer_matches_and_more_votes_are_surer():
    one = interpolate([5], [2], [1.0], 1.5)[5]
    longer = interpolate([5], [12], [1.0], 1.5)[5]
    more = interpolate([5, 5, 5], [2, 2, 2], [1.0] * 3, 1.5)[5]
    assert one < longer < 1
    assert one < more < 1


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_coupled_estimates_are_the_formula(seed):
    tokens = np.array([3, 9, 4000, 17], np.int32)
    q = np.array([0.4, 0.2, 0.1, 0.05])
    estimates = np.empty(4)
    votes.estimate_coupled(tokens, q, 4, np.uint64(seed), 77, 0.4, estimates)
    scores = np.log(q) + gumbel(seed, 77, tokens).astype(np.float64)
    share = np.exp(scores) / np.exp(scores).sum()
    first = share * np.exp(-(1 - q.sum()) * np.exp(-scores))
    np.testing.assert_allclose(estimates, 0.4 * first + 0.6 * q, rtol=1e-5)
    assert estimates.sum() <= 1


def make_drafter(store: int = 0) -> HistoryDrafter:
    rule = Rule(
        min_match=1,
        max_match=16,
        occurrences=8,
        longest_only=False,
        use_store=store > 0,
        store_weight=0.5,
        refresh=True,
        escape=1.0,
        coupled=True,
        trust=0.4,
        min_survival=0.01,
        vocab_size=100,
    )
    engine = engine_info(vocab_size=100, max_model_len=512, max_nodes=8)
    return HistoryDrafter(rule, store, engine)


def view(req_id: str, tokens) -> RequestView:
    return request(req_id, tokens, max_nodes=8, max_depth=8, temperature=1.0, seed=3)


def test_memory_stays_bounded():
    drafter = make_drafter(store=1000)
    rng = np.random.default_rng(0)
    sizes = set()
    for i in range(3000):
        tokens = rng.integers(0, 100, int(rng.integers(1, 600)))
        drafter.draft([view(f"r{i}", tokens)])
        drafter.release([f"r{i}"])
        sizes.add(len(drafter._index.text))
    assert max(sizes) <= 4096
    assert not drafter._slots and not drafter._known
    assert len(drafter._index.offsets) == 8


def test_segments_outgrown_are_used_again():
    drafter = make_drafter()
    drafter.draft([view("stays", [1])])
    for i in range(200):
        for length in (200, 500, 900):
            drafter.draft([view(f"r{i}", [1] * length)])
        drafter.release([f"r{i}"])
    # The store's, the one that stays, and one of each size.
    assert drafter._used == 256 + 256 + (256 + 512 + 1024)


def test_live_requests_survive_each_others_growth_and_release():
    shared, alone = make_drafter(), [make_drafter() for _ in range(6)]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 5, 900) for _ in range(6)]
    for step in range(60):
        for i, text in enumerate(texts):
            known = text[: 3 + 7 * step * (i + 1) % 900]
            if step % (7 + i) == 0:
                shared.release([str(i)])
                alone[i].release([str(i)])
            request = [view(str(i), known)]
            assert shared.draft(request) == alone[i].draft(request)


def test_the_store_is_renumbered_before_positions_overflow(monkeypatch):
    plain, renumbered = make_drafter(store=300), make_drafter(store=300)
    rng = np.random.default_rng(0)
    for i in range(40):
        request = [view(str(i), rng.integers(0, 4, 50))]
        with monkeypatch.context() as patch:
            limit = "vllm_specplugin.proposers._history.drafter._LAST_POSITION"
            patch.setattr(limit, 700)
            trees = renumbered.draft(request)
            renumbered.release([str(i)])
        assert trees == plain.draft(request)
        plain.release([str(i)])
    assert renumbered._index.ends[0] < plain._index.ends[0]
