from __future__ import annotations

from dataclasses import replace

import numpy as np

from vllm_specplugin import EMPTY_TREE, DraftTree
from vllm_specplugin.trees.step_layout import Move, StepLayout, scheduled_tree

TREE = DraftTree([7, 8, 9, 6], [-1, 0, -1, 2])  # chain 7-8 in front, branch 9-6


def layout() -> StepLayout:
    # A decode with a tree, a prompt chunk of 5 tokens, a decode with a chain.
    return StepLayout(
        trees=[TREE, EMPTY_TREE, DraftTree.chain([3])],
        root_rows=[0, 9, 10],
        root_positions=[20, 4, 50],
    )


def test_fingerprints_tell_what_ranks_must_agree_on():
    whole, tree = layout(), DraftTree([7, 8, 9, 6], [-1, 0, -1, 0])
    assert layout().fingerprint() == whole.fingerprint() < 1 << 32
    others = [
        replace(whole, root_positions=[20, 4, 51]),
        replace(whole, root_rows=[1, 9, 10]),
        replace(whole, trees=[tree, EMPTY_TREE, DraftTree.chain([3])]),
        replace(whole, trees=[TREE, EMPTY_TREE, DraftTree.chain([4])]),
        replace(whole, trees=[TREE, DraftTree.chain([3]), EMPTY_TREE]),
        replace(whole, trees=[TREE.prefix(3), EMPTY_TREE, DraftTree.chain([3])]),
    ]
    assert len({one.fingerprint() for one in [whole, *others]}) == 7


def test_rows_of_a_mixed_batch():
    step = layout()
    assert step.starts.tolist() == [0, 5, 6, 8]
    assert step.tokens.tolist() == [-1, 7, 8, 9, 6, -1, -1, 3]
    assert step.parents.tolist() == [-1, 0, 1, 0, 3, -1, -1, 6]
    assert step.depths.tolist() == [0, 1, 2, 1, 2, 0, 0, 1]
    assert step.emit_positions.tolist() == [21, 22, 23, 22, 23, 5, 51, 52]
    assert step.request_of_row.tolist() == [0] * 5 + [1, 2, 2]
    assert step.branching == [0]
    assert step.has_drafts


def test_positions_follow_depth_not_order():
    rows, positions = layout().node_positions()
    assert rows.tolist() == [1, 2, 3, 4]
    assert positions.tolist() == [21, 22, 21, 22]


def test_paths_of_rows():
    step = layout()
    assert [step.path_tokens(row) for row in range(8)] == [
        [], [7], [7, 8], [9], [9, 6], [], [], [3]
    ]  # fmt: skip


def test_only_misplaced_rows_move():
    step = layout()
    branch = np.array([[0, 3, 4], [5, 5, 5], [6, 7, 6]], dtype=np.int32)
    lengths = np.array([3, 1, 2], dtype=np.int32)
    assert step.moves(branch, lengths) == [Move(0, [3, 4], [1, 2])]
    chain = np.array([[0, 1, 2], [5, 5, 5], [6, 7, 6]], dtype=np.int32)
    assert step.moves(chain, lengths) == []


def test_a_draft_may_be_cut_short():
    assert scheduled_tree([7, 8, 9, 6], TREE) == TREE
    assert scheduled_tree([7, 8, 9], TREE) == TREE.prefix(3)
    assert scheduled_tree([], TREE) is EMPTY_TREE


def test_what_was_not_drafted_is_a_chain():
    for scheduled in ([-1, -1], [7, 9], [7, 8, 9, 6, 5]):
        tree = scheduled_tree(scheduled, TREE)
        assert tree.is_chain
        assert tree.tokens.tolist() == scheduled
    assert scheduled_tree([4], None).tokens.tolist() == [4]
