"""One tree from several proposers."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from tests.proposers.fake_heads import heads_folder
from vllm_specplugin.api import Needs, ProposeContext, ProposerBase
from vllm_specplugin.config import parse_options
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.proposers._fused import merge_numba
from vllm_specplugin.proposers._fused.member import MAX_FAILURES
from vllm_specplugin.proposers.fused import FusedProposer
from vllm_specplugin.testing import engine_info, propose_context
from vllm_specplugin.testing import request as view
from vllm_specplugin.trees.batch import Forest
from vllm_specplugin.trees.tree import EMPTY_TREE, DraftTree

ENGINE = engine_info()


class Says(ProposerBase):
    """Drafts what it was told, for every request."""

    tree = EMPTY_TREE
    released: list[str]

    def __init__(self, config, engine) -> None:
        self.released = []

    def propose(self, ctx):
        order = np.argsort(-self.tree.survival, kind="stable")
        return [self.tree.take(np.sort(order[: r.max_nodes])) for r in ctx.requests]

    def release(self, req_ids):
        self.released += req_ids


class Left(Says):
    tree = DraftTree.chain([1, 2], [0.6, 0.6])


class Right(Says):
    tree = DraftTree([1, 3, 4], [-1, 0, -1], [0.6, 0.2, 0.3])
    needs = Needs(top_tokens=2)
    shown = None

    def observe_rows(self, tokens, top, emitted, scope):
        self.shown = tokens, top, emitted


class Wrong(Says):
    tree = DraftTree([30], [-1])  # outside the vocabulary


class Raises(Says):
    needs = Needs(top_tokens=5)

    def propose(self, ctx):
        raise RuntimeError("no drafts today")

    def observe_rows(self, *rows, scope):
        raise RuntimeError("no rows today")

    release = propose


def names(*members: str) -> list[str]:
    return [f"{__name__}:{name}" for name in members]


def make(*members: str, **options) -> FusedProposer:
    values = {"members": names(*members), **options}
    return FusedProposer(parse_options(FusedProposer.Config, values, "fused"), ENGINE)


def draft(proposer, tokens, req_id="a", **options) -> DraftTree:
    return proposer.propose(ProposeContext(requests=[view(req_id, tokens, **options)]))[0]


def paths(tree, values) -> dict[tuple[int, ...], float]:
    return {tuple(tree.tokens[tree.path(i)].tolist()): float(values[i]) for i in range(len(tree))}


def random_trees(rng, count) -> list[DraftTree]:
    trees = [EMPTY_TREE]
    for _ in range(count - 1):
        raw = DraftTree.from_paths(rng.integers(0, 3, (4, int(rng.integers(1, 4)))))
        trees.append(DraftTree(raw.tokens, raw.parents, rng.random(len(raw))))
    return [trees[i] for i in rng.permutation(count)]


def test_merging_keeps_every_path_once_with_its_best_estimate():
    rng = np.random.default_rng(0)
    for _ in range(100):
        members = [random_trees(rng, 4) for _ in range(3)]
        forest = Forest.of([tree for trees in members for tree in trees])
        size = len(forest)
        starts = np.empty(5, dtype=np.int64)
        tokens, parents, depths, votes = np.empty((4, size), dtype=np.int64)
        values = np.empty(size)
        merge_numba.merge(
            4, forest.starts, forest.tokens, forest.parents, forest.estimates,
            starts, tokens, parents, depths, values, votes,
        )  # fmt: skip
        for i in range(4):
            want: dict[tuple[int, ...], list[float]] = {}
            for trees in members:
                for path, value in paths(trees[i], trees[i].estimates).items():
                    want.setdefault(path, []).append(value)
            nodes = slice(starts[i], starts[i + 1])
            above = parents[nodes]
            tree = DraftTree(tokens[nodes], np.where(above >= 0, above - starts[i], -1))
            assert paths(tree, values[nodes]) == {p: max(v) for p, v in want.items()}
            assert paths(tree, votes[nodes]) == {p: len(v) for p, v in want.items()}
            assert depths[nodes].tolist() == tree.depths.tolist()


def test_a_members_twins_are_one_vote():
    tree = DraftTree([1, 1, 2], [-1, -1, 1], [0.3, 0.4, 0.5])
    starts, size = np.array([0, 3]), 3
    out_starts = np.empty(2, dtype=np.int64)
    tokens, parents, depths, votes = np.empty((4, size), dtype=np.int64)
    forest, values = Forest.of([tree]), np.empty(size)
    merge_numba.merge(
        1, starts, forest.tokens, forest.parents, forest.estimates,
        out_starts, tokens, parents, depths, values, votes,
    )  # fmt: skip
    assert out_starts.tolist() == [0, 2]
    assert tokens[:2].tolist() == [1, 2] and parents[:2].tolist() == [-1, 0]
    assert votes[:2].tolist() == [1, 1]


def test_choosing_and_packing_is_what_trees_do_by_themselves():
    rng = np.random.default_rng(1)
    for _ in range(100):
        trees = random_trees(rng, 5)
        forest = Forest.of(trees)
        most = rng.integers(0, 6, 5)
        keep = np.empty(len(forest), dtype=np.bool_)
        merge_numba.likeliest(forest.starts, forest.parents, forest.estimates, most, keep)
        starts = np.empty(6, dtype=np.int64)
        parents = np.empty(len(forest), dtype=np.int64)
        merge_numba.pack(forest.starts, forest.parents, keep, starts, parents)
        for i, tree in enumerate(trees):
            order = np.argsort(-tree.survival, kind="stable")
            expected = tree.take(np.sort(order[: most[i]]))
            nodes = slice(starts[i], starts[i + 1])
            assert forest.tokens[keep][nodes].tolist() == expected.tokens.tolist()
            assert parents[nodes].tolist() == expected.parents.tolist()


def test_the_likeliest_nodes_fill_the_budget():
    whole = draft(make("Left", "Right"), [5])
    survival = paths(whole, whole.survival)
    assert survival.keys() == {(1,), (1, 2), (1, 3), (4,)}
    for n in range(1, 4):
        got = draft(make("Left", "Right"), [5], max_nodes=n)
        assert set(paths(got, got.survival)) == set(
            sorted(survival, key=survival.get, reverse=True)[:n]
        )


def test_estimates_follow_what_the_text_makes_of_each_member():
    proposer = make("Left", "Right")
    text = [9]
    for _ in range(120):  # what follows is always 4: the second member knows
        tree = draft(proposer, text)
        text = [*text, 4, 9]
    survival = paths(tree, tree.survival)
    assert survival[4,] > 0.6
    assert survival[1,] < 0.2
    told = proposer.snapshot()
    assert all(told[name]["estimates"]["observed"] > 100 for name in names("Left", "Right"))
    few = draft(proposer, text, max_nodes=2)
    assert few.tokens[np.argmax(few.survival)] == 4 and len(few) == 2


@pytest.mark.parametrize("token", [1, 4])
def test_agreement_is_never_worth_less_than_the_best_member(token):
    proposer = make("Left", "Right")
    for n in range(1, 150):
        tree = draft(proposer, [token] * n)
    alone = make("Left")
    for n in range(1, 150):
        single = draft(alone, [token] * n)
    assert paths(tree, tree.survival)[1,] >= paths(single, single.survival)[1,] - 1e-6


@pytest.mark.parametrize("bad", ["Raises", "Wrong"])
def test_a_failing_member_costs_its_own_drafts(bad, caplog):
    proposer = make(bad, "Left")
    assert proposer.needs.top_tokens == (5 if bad == "Raises" else 0)
    with caplog.at_level(logging.ERROR):
        for _ in range(MAX_FAILURES + 5):
            assert draft(proposer, [5]) == Left.tree
    assert caplog.text.count("failed, counted") == 1
    assert caplog.text.count("is left out") == 1
    told = proposer.snapshot()[names(bad)[0]]
    assert told["failures"] == MAX_FAILURES and not told["enabled"]
    assert proposer.needs.top_tokens == 0
    proposer.release(["a"])


def test_members_get_their_share_of_rows_and_every_release():
    proposer = make("Right", "Left")
    top = np.arange(15, dtype=np.int32).reshape(3, 5)
    row = np.array([7, 8, 9], dtype=np.int32)
    proposer.observe_rows(row, top, row)
    right, left = (m.proposer for m in proposer._members)
    assert (right.shown[1] == top[:, :2]).all() and (right.shown[0] == row).all()
    draft(proposer, [5])
    proposer.release(["a"])
    assert right.released == left.released == ["a"] and not proposer._past


def test_a_member_may_read_hidden_states():
    values = {"members": ["ngram", "medusa"],
              "member_options": {"medusa": {"model": heads_folder(0)}}}  # fmt: skip
    proposer = FusedProposer(parse_options(FusedProposer.Config, values, "fused"), ENGINE)
    assert proposer.needs.hidden and proposer.needs.lm_head
    assert make("Left").needs == Needs()
    [tree] = proposer.propose(propose_context(view("a", [5])))
    assert len(tree)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"members": []}, "a list of different proposers"),
        ({"members": "suffix"}, "a list of different proposers"),
        ({"members": ["suffix", "fused"]}, "'fused' not among them"),
        ({"members": ["suffix", "suffix"]}, "a list of different proposers"),
        ({"members": ["sufix"]}, "'sufix'"),
        ({"member_options": {"ngram": {}}}, "options for ngram"),
        ({"member_options": {"suffix": {"depht": 1}}}, "suffix options has no 'depht'"),
        ({"members": ["none"], "member_options": {"none": {"a": 1}}}, "for 'none'"),
    ],
)  # fmt: skip
def test_wrong_members_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        FusedProposer(parse_options(FusedProposer.Config, values, "fused"), ENGINE)


def test_one_member_may_ask_vllm_for_a_drafter():
    def ask(*members, **options):
        values = {"members": members, "member_options": options}
        parsed = parse_options(FusedProposer.Config, values, "fused")
        return FusedProposer.speculative(parsed), FusedProposer(parsed, ENGINE).needs.vllm_drafter

    assert ask("suffix", "token_recycling") == ({}, False)
    model = {"model": "here"}
    asked, native = ask("suffix", "draft_model", draft_model=model)
    assert asked == {"method": "draft_model", "model": "here", "driven": True}
    assert not native
    asked, native = ask("suffix", "vllm:ngram")
    assert asked["method"] == "ngram" and native
    with pytest.raises(ConfigError, match="at most one"):
        ask("draft_model", "vllm:ngram", draft_model=model)


def test_what_is_learnt_does_not_depend_on_the_other_requests_order():
    trees = []
    for order in itertools.permutations(range(3)):
        proposer = make("Left", "Right")
        for n in range(1, 20):
            views = [view(str(i), [i, *[1 + i] * n]) for i in order]
            drafted = proposer.propose(ProposeContext(requests=views))
        trees.append([np.round(drafted[order.index(i)].estimates, 4) for i in range(3)])
    for other in trees[1:]:
        for one, same in zip(trees[0], other):
            np.testing.assert_allclose(one, same, atol=1e-3)
