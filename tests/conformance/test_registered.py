"""What every registered proposer, scorer and policy must do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.proposers.fake_heads import heads_folder
from tests.proposers.fake_model import equipped
from vllm_specplugin import POLICIES, PROPOSERS, SCORERS, DraftTree
from vllm_specplugin.api import (
    BudgetContext,
    EngineInfo,
    LengthPolicy,
    Proposer,
    RequestView,
    ScoreBatch,
    Scorer,
    StepOutcome,
    TrimContext,
)
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.trees.batch import Forest
from vllm_specplugin.trees.step_layout import StepLayout

ENGINE = EngineInfo(vocab_size=30, max_model_len=256, max_num_seqs=8, max_nodes=16)


NEEDED = {"medusa": {"model": heads_folder()}}
"""Options that a proposer cannot do without."""


def make(role: str, name: str):
    settings = {"proposer": "none", role: name}
    options = {"proposer": NEEDED.get(settings["proposer"], {})}
    return build(SpecConfig(**settings, options=options), role, ENGINE)


def view(req_id: str, tokens, *, nodes=16, depth=16, temperature=0.0) -> RequestView:
    tokens = np.asarray(tokens, dtype=np.int32)
    tokens.flags.writeable = False
    return RequestView(
        req_id=req_id,
        tokens=tokens,
        num_prompt_tokens=min(3, len(tokens)),
        max_nodes=nodes,
        max_depth=depth,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        seed=11,
        options={},
    )


def propose(proposer, *views) -> list[DraftTree]:
    return list(proposer.propose(equipped(views, ENGINE.vocab_size)))


TEXTS = [[4], [1, 2], [5, 6, 7] * 20, list(range(30)) * 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", PROPOSERS.names())
def test_proposers_draft_trees_within_limits(name, temperature):
    proposer = make("proposer", name)
    assert isinstance(proposer, Proposer)
    assert propose(proposer) == []
    for nodes, depth in [(16, 16), (1, 16), (16, 1), (5, 3)]:
        views = [
            view(f"{i}-{nodes}-{depth}", text, nodes=nodes, depth=depth,
                 temperature=temperature)
            for i, text in enumerate(TEXTS)
        ]  # fmt: skip
        trees = propose(proposer, *views)
        assert len(trees) == len(views)
        for tree in trees:
            DraftTree(tree.tokens, tree.parents, tree.estimates)
            tree.validate(max_nodes=nodes, vocab_size=ENGINE.vocab_size)
            assert tree.max_depth <= depth


@pytest.mark.parametrize("name", PROPOSERS.names())
def test_proposers_are_deterministic_and_do_not_mind_company(name):
    first, second = make("proposer", name), make("proposer", name)
    views = [view(str(i), t, temperature=1.0) for i, t in enumerate(TEXTS)]
    together = propose(first, *views)
    alone = [propose(second, v)[0] for v in reversed(views)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.parents.tolist() == other.parents.tolist()
        # Products of one row and of several may round differently.
        assert one.estimates == pytest.approx(other.estimates, rel=1e-5)


@pytest.mark.parametrize("name", PROPOSERS.names())
def test_released_ids_start_afresh(name):
    proposer, fresh = make("proposer", name), make("proposer", name)
    proposer.release(["never seen"])
    propose(proposer, view("a", [1, 2, 3] * 10))
    proposer.release(["a"])
    proposer.release(["a"])
    # Another text under the old id, unlike anything seen before.
    text = [20, 21, 22, 23] * 8
    assert propose(proposer, view("a", text)) == propose(fresh, view("a", text))
    # Growing step by step or read at once is the same.
    for n in range(1, len(text) + 1):
        grown = propose(proposer, view("b", text[:n]))
    proposer.release(["a"])
    models = ("speculative", "needs_hidden")
    if not any(getattr(proposer, name, False) for name in models):
        # A model may say anything; others only what they have seen.
        assert grown[0].tokens.tolist()[:1] in ([20], [])


@pytest.mark.parametrize("name", SCORERS.names())
def test_scorers_emit_at_least_one_token_of_the_vocabulary(name):
    scorer = make("scorer", name)
    assert isinstance(scorer, Scorer)
    trees = [DraftTree([], []), DraftTree([3, 4, 5], [-1, -1, 1]), DraftTree.chain([-1])]
    layout = StepLayout(trees=trees, root_rows=[0, 1, 5], root_positions=[9, 9, 9])
    torch.manual_seed(0)
    result = scorer.score(
        ScoreBatch(
            logits=torch.randn(layout.num_rows, ENGINE.vocab_size),
            starts=layout.starts,
            tokens=layout.tokens,
            parents=layout.parents,
            positions=layout.emit_positions,
            greedy=np.array([True, False, True]),
            seeds=np.arange(3, dtype=np.uint64),
        )
    )
    assert (result.lengths >= 1).all()
    assert result.lengths[0] == result.lengths[2] == 1  # nothing, then padding
    for request, length in enumerate(result.lengths):
        emitted = result.tokens[request]
        assert ((emitted[:length] >= 0) & (emitted[:length] < ENGINE.vocab_size)).all()
        assert (emitted[length:] == -1).all()
        rows = result.rows[request, :length]
        assert rows[0] == layout.starts[request]
        assert (layout.parents[rows[1:]] == rows[:-1]).all()
        assert (layout.tokens[rows[1:]] == emitted[: length - 1]).all()


def outcome(req_ids, *, drafted=2, accepted=1, seconds=0.01) -> StepOutcome:
    n = len(req_ids)
    return StepOutcome(
        req_ids=req_ids,
        num_tokens=[5] * n,
        drafted=[drafted] * n,
        deepest=[drafted] * n,
        accepted=[accepted] * n,
        foreseen=[accepted] * n,
        masked=0,
        prompt_tokens=0,
        seconds=seconds,
        gap_seconds=0.0,
        draft_requests=n,
        draft_seconds=0.0001,
    )


def trimmed(policy, trees, *, sampled=False, floors=None) -> np.ndarray:
    forest = Forest.of(trees)
    names = [str(i) for i in range(len(trees))]
    keep = policy.trim(
        TrimContext(
            req_ids=names,
            num_tokens=[5] * len(trees),
            floors=floors or [0] * len(trees),
            starts=forest.starts,
            parents=forest.parents,
            depths=forest.depths,
            estimates=forest.estimates,
            survival=forest.survival(),
            off_chain=forest.off_chain(),
            sampled=np.full(len(trees), sampled),
        )
    )
    assert keep.shape == (len(forest),) and keep.dtype == np.bool_
    assert forest.closed(keep)
    return keep


def budgets(policy, limits) -> list[int]:
    n = len(limits)
    names = [str(i) for i in range(n)]
    return list(
        policy.budget(
            BudgetContext(req_ids=names, limits=limits, num_tokens=[5] * n, options=[{}] * n)
        )
    )


def random_tree(rng, most=10) -> DraftTree:
    n = int(rng.integers(0, most))
    parents = [int(rng.integers(-1, i)) for i in range(n)]
    return DraftTree(rng.integers(0, 30, n), parents, rng.random(n))


@pytest.mark.parametrize("name", POLICIES.names())
def test_policies_answer_for_every_request(name):
    policy = make("policy", name)
    assert isinstance(policy, LengthPolicy)
    rng = np.random.default_rng(1)
    for _ in range(30):
        limits = [16, 3, 0]
        given = budgets(policy, limits)
        assert len(given) == 3
        assert all(0 <= b <= limit for b, limit in zip(given, limits))
        trimmed(policy, [random_tree(rng) for _ in range(3)])
        policy.observe(outcome(["0", "1"], drafted=int(rng.integers(0, 3))))
    if hasattr(policy, "release"):
        policy.release(["0", "never seen"])
    if hasattr(policy, "snapshot"):
        json.dumps(policy.snapshot())


@pytest.mark.parametrize("name", POLICIES.names())
def test_policies_do_not_look_at_the_token_they_decide_on(name):
    """The value of a sampled token shows in what the draft says *after* it.
    Whatever that is, whether the token itself is kept must not change."""
    rng = np.random.default_rng(2)
    changed = 0
    for _ in range(300):
        others = [random_tree(rng, 6), random_tree(rng, 6)]
        tree = random_tree(rng)
        if not len(tree):
            continue
        node = int(rng.integers(len(tree)))
        below = tree.ancestor_mask()[:, node].copy()
        below[node] = False
        estimates = tree.estimates.copy()
        estimates[below] = rng.random(int(below.sum()))
        other_value = DraftTree(tree.tokens, tree.parents, estimates)
        kept = []
        for variant in (tree, other_value):
            policy = make("policy", name)
            budgets(policy, [16, 16, 16])
            for _ in range(6):
                policy.observe(outcome(["0", "1", "2"], seconds=0.02))
            keep = trimmed(policy, [others[0], variant, others[1]], sampled=True)
            kept.append(bool(keep[len(others[0]) + node]))
            changed += int(below.any())
        assert kept[0] == kept[1]
    assert changed
