"""``ngram`` and ``suffix``: behaviour, limits and determinism."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from vllm_specplugin.api import ProposeContext
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.testing import engine_info, request
from vllm_specplugin.trees.tree import ROOT

VOCAB = 1000
ENGINE = engine_info(vocab_size=VOCAB, max_model_len=4096, max_num_seqs=16)
NAMES = ["ngram", "suffix"]
both = pytest.mark.parametrize("name", NAMES)


def make(name, **options):
    options = {"min_survival": 0.0} | options
    config = SpecConfig(proposer=name, options={"proposer": options})
    return build(config, "proposer", ENGINE)


def view(tokens, req_id="r", **changes):
    return request(req_id, tokens, num_prompt_tokens=1, **changes)


def draft(proposer, *views):
    return proposer.propose(ProposeContext(requests=views))


def children(tree, parent=ROOT):
    return {
        int(token): float(estimate)
        for token, above, estimate in zip(tree.tokens, tree.parents, tree.estimates, strict=True)
        if above == parent
    }


@both
def test_continues_a_copied_passage(name):
    [tree] = draft(make(name), view([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3], max_nodes=4))
    assert tree.best_chain().tokens.tolist() == [4, 5, 6, 7]


@both
def test_two_continuations_make_a_branch(name):
    text = [1, 2, 3, 50, 1, 2, 3, 50, 1, 2, 4, 60, 1, 2]
    [tree] = draft(make(name), view(text))
    roots = children(tree)
    assert set(roots) == {3, 4}
    assert roots[3] > roots[4] > 0
    assert children(tree, tree.tokens.tolist().index(4))[60] > 0.3


def test_ngram_drafts_from_the_longest_match_only():
    text = [1, 2, 3, 70, 9, 2, 3, 80, 9, 2, 3, 80, 1, 2, 3]
    [tree] = draft(make("ngram", max_match=3), view(text))
    assert set(children(tree)) == {70}
    [tree] = draft(make("ngram", max_match=2), view(text))
    assert set(children(tree)) == {70, 80}
    assert len(draft(make("ngram", min_match=4, max_match=9), view(text))[0]) == 0


def test_suffix_backs_off_to_shorter_matches():
    text = [1, 2, 3, 70, 9, 2, 3, 80, 9, 2, 3, 80, 5, 3, 90, 1, 2, 3]
    roots = children(draft(make("suffix"), view(text, max_depth=1))[0])
    assert set(roots) == {70, 80, 90}
    assert roots[70] > roots[90]


@both
def test_a_longer_match_is_surer(name):
    run = list(range(10, 22))
    short = draft(make(name), view([*run, 99, 1, *run[-2:]]))[0]
    long = draft(make(name), view([*run, 99, 1, *run]))[0]
    assert children(short)[99] < children(long)[99] < 1


def test_finished_requests_are_drafted_from():
    proposer = make("suffix")
    assert len(draft(proposer, view([1, 2, 3], "b"))[0]) == 0
    draft(proposer, view([7, 1, 2, 3, 4, 5, 6], "a"))
    proposer.release(["a"])
    [tree] = draft(proposer, view([1, 2, 3], "b"))
    assert tree.best_chain().tokens.tolist() == [4, 5, 6]
    off = make("suffix", store_tokens=0)
    draft(off, view([7, 1, 2, 3, 4, 5, 6], "a"))
    off.release(["a"])
    assert len(draft(off, view([1, 2, 3], "b"))[0]) == 0


def test_own_text_is_preferred_to_the_store():
    proposer = make("suffix")
    draft(proposer, view([1, 2, 3, 70], "a"))
    proposer.release(["a"])
    [tree] = draft(proposer, view([1, 2, 3, 60, 1, 2, 3], "b"))
    assert tree.tokens[0] == 60
    assert set(children(tree)) == {60, 70}


def test_the_store_forgets_the_oldest():
    proposer = make("suffix", store_tokens=512)
    for i in range(100):
        draft(proposer, view([*range(8 * i, 8 * i + 8)], f"r{i}"))
        proposer.release([f"r{i}"])
    assert len(draft(proposer, view([797], "new"))[0]) > 0
    assert len(draft(proposer, view([5], "old"))[0]) == 0


def repetitive(rng, length):
    """Random text with copied runs over few tokens."""
    text = rng.integers(0, 8, length)
    for _ in range(length // 20):
        source, target = rng.integers(0, length - 10, 2)
        text[target : target + 10] = text[source : source + 10]
    return text


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_are_valid_and_within_limits(name, temperature):
    rng = np.random.default_rng(0)
    proposer = make(name, min_survival=0.02)
    drafted = 0
    for _ in range(60):
        nodes, depth = int(rng.integers(1, 17)), int(rng.integers(1, 9))
        text = repetitive(rng, int(rng.integers(30, 300)))
        request = view(text, max_nodes=nodes, max_depth=depth, temperature=temperature)
        [tree] = draft(proposer, request)
        tree._check()
        tree.validate(max_nodes=nodes, vocab_size=VOCAB)
        drafted += len(tree)
        assert tree.max_depth <= depth
        assert (np.diff(tree.survival) <= 1e-6).all()
        assert (tree.survival >= 0.019).all()
        siblings = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
        assert len(set(siblings)) == len(siblings)
        for parent in range(ROOT, len(tree)):
            assert sum(children(tree, parent).values()) <= 1 + 1e-5
        proposer.release(["r"])
    assert drafted > 100


@both
def test_short_texts_and_small_limits(name):
    proposer = make(name)
    assert draft(proposer) == []
    assert len(draft(proposer, view([]))[0]) == 0
    assert len(draft(proposer, view([5]))[0]) == 0
    assert len(draft(proposer, view([5, 5, 5, 5], max_nodes=1))[0]) == 1
    assert draft(proposer, view([5] * 6, max_depth=1))[0].max_depth == 1
    assert len(draft(proposer, view([5] * 9, max_depth=0))[0]) == 0


@both
def test_tokens_outside_the_vocabulary_are_not_drafted(name):
    placeholders = [1, 2, VOCAB, 3, 1, 2, -1, 3, 1, 2, 7, 1, 2]
    [tree] = draft(make(name), view(placeholders))
    tree.validate(max_nodes=16, vocab_size=VOCAB)
    assert 7 in tree.tokens


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_incremental_drafts_equal_drafts_from_scratch(name, temperature):
    text = repetitive(np.random.default_rng(2), 700)
    proposer = make(name)
    n = 1
    while n < len(text):
        request = view(text[:n], temperature=temperature)
        assert draft(proposer, request) == draft(make_once(name), request)
        n += n % 5 + 20 * (n % 7 == 0)


_ONCE = {}


def make_once(name):
    """One proposer per name that is shown everything as if for the first time."""
    options = {"store_tokens": 0} if name == "suffix" else {}
    proposer = _ONCE.setdefault(name, make(name, **options))
    proposer.release(["r"])
    return proposer


@both
@pytest.mark.parametrize("change", ["shorter", "tail", "reused"])
def test_a_changed_text_is_indexed_anew(name, change):
    proposer = make(name, **({"store_tokens": 0} if name == "suffix" else {}))
    text = repetitive(np.random.default_rng(3), 200)
    draft(proposer, view(text))
    if change == "shorter":
        text = text[:150]
    elif change == "tail":
        text = np.append(text[:-1], [(text[-1] + 1) % 8, 3])
    else:
        proposer.release(["r", "never seen"])
        text = text[::-1]
    assert draft(proposer, view(text)) == draft(make_once(name), view(text))


@both
def test_order_in_the_batch_and_instance_do_not_matter(name):
    rng = np.random.default_rng(4)
    texts = [repetitive(rng, 400) for _ in range(12)]
    one, two = make(name), make(name)
    for step in range(40):
        requests = [
            view(text[: 20 + 9 * step], f"a{i}", temperature=i % 2, seed=i)
            for i, text in enumerate(texts)
        ]
        order = rng.permutation(len(requests))
        renamed = [dataclasses.replace(requests[i], req_id=f"b{i * 31 % 17}") for i in order]
        expected = draft(one, *requests)
        got = draft(two, *renamed)
        assert got == [expected[i] for i in order]
        if step % 6 == 0:
            one.release([f"a{i}" for i in range(step % 12)])
            two.release([f"b{i * 31 % 17}" for i in range(step % 12)])


@both
def test_the_first_coupled_candidate_wins_with_the_noise(name):
    text = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 6, 1, 2]
    tokens = np.array([3, 4, 5, 6])
    firsts = set()
    for seed in range(40):
        request = view(text, seed=seed, temperature=1.0, max_nodes=1)
        first = int(draft(make_once(name), request)[0].tokens[0])
        # All four have one vote each, so q does not matter.
        assert first == tokens[gumbel(seed, len(text), tokens).argmax()]
        firsts.add(first)
    assert firsts == {3, 4, 5, 6}


@both
def test_coupling_ranks_by_counts_and_noise_at_every_depth(name):
    loop = [1, 2, 30, 9, 1, 2, 30, 8, 1, 2, 30, 9, 1, 2, 40, 7]
    text = loop * 2 + [1, 2]
    proposer, plain = make(name, trust=1.0), make(name, coupled=False)
    compared = [0, 0]
    for seed in range(20):
        request = view(text, seed=seed, temperature=1.0, max_depth=2)
        [tree], [counts] = draft(proposer, request), draft(plain, request)
        for depth, parent in enumerate([ROOT, root_child(counts, 30)]):
            q = children(counts, parent)
            tokens = np.array(list(q))
            noise = gumbel(seed, len(text) + depth, tokens)
            scores = np.log(list(q.values())) + noise
            same = ROOT if parent == ROOT else root_child(tree, 30)
            if estimates := children(tree, same):
                best = max(estimates, key=estimates.get)
                assert best == tokens[scores.argmax()]
                compared[depth] += 1
    assert compared[0] == 20
    assert compared[1] > 5


def root_child(tree, token):
    """Index of the child of the root that holds ``token``."""
    roots = (tree.parents == ROOT) & (tree.tokens == token)
    return int(roots.argmax()) if roots.any() else len(tree)


@both
def test_noise_is_ignored_when_greedy_or_uncoupled(name):
    text = repetitive(np.random.default_rng(5), 100)
    trees = [draft(make_once(name), view(text, seed=seed, temperature=0.0))[0] for seed in range(3)]
    plain = make(name, coupled=False)
    trees += draft(plain, view(text, temperature=1.0, seed=9))
    assert all(tree == trees[0] for tree in trees)


def test_ngram_refuses_limits_that_cross():
    with pytest.raises(ConfigError, match=r"min_match=5.*at most max_match=3"):
        make("ngram", min_match=5, max_match=3)


def test_importing_the_proposers_is_cheap():
    code = (
        "import sys; import vllm_specplugin.proposers.ngram, "
        "vllm_specplugin.proposers.suffix; "
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
