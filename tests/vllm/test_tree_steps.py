"""The parts of a step with trees on the device: the compiled twins against the trees of
arrays and the rule in words."""

from __future__ import annotations

import pytest
import torch

from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees
from vllm_specplugin.vllm.verification import trees

from .tree_cases import SLOTS, Case, kept_case, tree_case


def laid_out(case: Case, nodes: int) -> DeviceTrees:
    made = DeviceTrees(SLOTS, nodes, torch.device("cpu"))
    made.num_nodes.fill_(99)  # of an earlier step
    made.lay_out(case.kept_tokens, case.kept_parents, case.slots, case.starts)
    return made


@pytest.mark.parametrize("nodes", [1, 7, 33, 64, 70, 130])
@pytest.mark.parametrize("seed", range(4))
def test_trees_are_laid_out_in_batch_order(seed: int, nodes: int) -> None:
    case = tree_case(seed, nodes)
    made = laid_out(case, nodes)
    assert made.num_nodes.tolist() == [len(t) for t in case.trees] + [0] * (SLOTS - len(case.trees))
    for r, tree in enumerate(case.trees):
        n = len(tree)
        assert made.tokens[r].tolist() == tree.tokens.tolist() + [-1] * (nodes - n)
        assert made.parents[r].tolist() == tree.parents.tolist() + [-1] * (nodes - n)
        assert made.depths[r].tolist() == tree.depths.tolist() + [1] * (nodes - n)
        for i, seen in enumerate(tree.ancestor_mask()):
            words = [int(word) for word in made.ancestors[r, i]]
            assert [words[j // 64] >> (j % 64) & 1 for j in range(n)] == seen.astype(int).tolist()


@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_walk_is_that_of_exact(seed: int, invalid: bool) -> None:
    case = tree_case(seed)
    walked = walk(case, invalid)
    rows, tokens = case.expected(invalid)
    for r, samples in enumerate(case.samples):
        length, start = len(rows[r]), int(case.starts[r])
        assert walked.emitted[r, :length].tolist() == tokens[r]
        assert walked.path[r].tolist() == rows[r] + [0] * (8 - length)
        assert walked.num_sampled[r] == length * samples
        assert walked.num_rejected[r] == (1 + len(case.trees[r]) - length) * samples
        assert walked.last_rows[r] == start + rows[r][-1]
        assert walked.emitted[r, -1] == sum(row != i for i, row in enumerate(rows[r]))


@pytest.mark.parametrize("seed", range(12))
def test_a_proposer_is_shown_what_rows_read_and_emit(seed: int) -> None:
    case = tree_case(seed)
    walked, blind = walk(case, True), walk(case, True, observed=False)
    assert torch.equal(blind.path, walked.path)
    assert len(blind.read) == len(blind.emits) == 0
    rows, tokens = case.expected(True)
    for r, samples in enumerate(case.samples):
        start, tree = int(case.starts[r]), case.trees[r]
        refused = case.invalid[start + 1 : start + 1 + len(tree)].tolist()
        nodes = [-1 if bad else token for bad, token in zip(refused, tree.tokens.tolist())]
        assert walked.read[start : start + 1 + len(tree)].tolist() == [case.inputs[start], *nodes]
        assert walked.emitted[r, -2] == sum(token >= 0 for token in nodes)
        emits = [-1] * (1 + len(tree))
        for row, token in zip(rows[r], tokens[r]):
            emits[row] = token if samples else -1
        assert walked.emits[start : start + 1 + len(tree)].tolist() == emits


def walk(case: Case, invalid: bool, observed: bool = True) -> trees.Walked:
    made = laid_out(case, 7)
    return trees.walk(
        case.chosen,
        case.inputs,
        case.invalid if invalid else None,
        made.tokens,
        made.parents,
        case.starts,
        case.slots,
        case.seq_lens,
        case.prefill_lens,
        observed,
    )


@pytest.mark.parametrize("seed", range(12))
def test_what_must_not_be_verified_is_not_kept(seed: int) -> None:
    case = kept_case(seed)
    tokens, parents, slots, limits, chains, vocab = case
    kept = torch.full((2, SLOTS, 7), -7)
    shown = trees.keep(kept[0], kept[1], *case)
    for r, slot in enumerate(slots.tolist()):
        for i in range(7):
            token, parent = int(tokens[r, i]), min(max(int(parents[r, i]), -1), i - 1)
            if token >= vocab or i >= limits[slot] or (chains[slot] and parent != i - 1):
                token = -1
            assert kept[:, slot, i].tolist() == [token, parent]
            assert shown[r, i] == max(token, 0)
    others = [slot for slot in range(SLOTS) if slot not in slots.tolist()]
    assert (kept[:, others] == -7).all()
