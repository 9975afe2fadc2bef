"""The parts of a step with trees, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from tests.vllm.tree_cases import SLOTS, kept_case, tree_case
from vllm_specplugin.vllm.kv_cache.rows import KVRows, compact_reference
from vllm_specplugin.vllm.tree_attention.device_trees import DeviceTrees
from vllm_specplugin.vllm.verification import launch, trees

T = TypeVar("T")


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], T]], tuple[T, T]]:
    """Runs something with the twin and with the kernel."""

    def run(make: Callable[[], T]) -> tuple[T, T]:
        twin = make()
        with monkeypatch.context() as patch:
            patch.setattr(launch, "uses_twins", lambda device: False)
            return twin, make()

    return run


@pytest.mark.parametrize(("seed", "nodes"), [(0, 7), (1, 7), (2, 1), (3, 33), (4, 64), (5, 70)])
def test_laying_out(seed: int, nodes: int, both: Callable[..., tuple[DeviceTrees, ...]]) -> None:
    case = tree_case(seed, nodes)

    def laid_out() -> DeviceTrees:
        made = DeviceTrees(SLOTS, nodes, torch.device("cpu"))
        made.num_nodes.fill_(99)
        made.lay_out(case.kept_tokens, case.kept_parents, case.slots, case.starts)
        return made

    twin, kernel = both(laid_out)
    assert torch.equal(kernel.num_nodes, twin.num_nodes)
    for name in ("tokens", "parents", "depths", "ancestors"):
        assert torch.equal(getattr(kernel, name), getattr(twin, name)), name


@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_walking(
    seed: int, observed: bool, invalid: bool, both: Callable[..., tuple[trees.Walked, ...]]
) -> None:
    case = tree_case(seed)
    laid_out = DeviceTrees(SLOTS, 7, torch.device("cpu"))
    laid_out.lay_out(case.kept_tokens, case.kept_parents, case.slots, case.starts)

    def walked() -> trees.Walked:
        return trees.walk(
            case.chosen,
            case.inputs,
            case.invalid if invalid else None,
            laid_out.tokens,
            laid_out.parents,
            case.starts,
            case.slots,
            case.seq_lens,
            case.prefill_lens,
            observed,
        )

    twin, kernel = both(walked)
    for name in ("path", "num_sampled", "num_rejected", "last_rows", "read", "emits"):
        assert torch.equal(getattr(kernel, name), getattr(twin, name)), name
    for row, other, length in zip(kernel.emitted, twin.emitted, (twin.path > 0).sum(1).tolist()):
        assert torch.equal(row[: length + 1], other[: length + 1])
        assert torch.equal(row[-2:], other[-2:])


@pytest.mark.parametrize("seed", range(6))
def test_keeping(seed: int, both: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    case = kept_case(seed)

    def kept() -> torch.Tensor:
        made = torch.full((2, SLOTS, 7), -7)
        shown = trees.keep(made[0], made[1], *case)
        return torch.cat([made.flatten(), shown.flatten()])

    twin, kernel = both(kept)
    assert torch.equal(kernel, twin)


@pytest.mark.parametrize("seed", range(4))
def test_placing(seed: int, both: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    case = tree_case(seed)
    laid_out = DeviceTrees(SLOTS, 7, torch.device("cpu"))
    laid_out.lay_out(case.kept_tokens, case.kept_parents, case.slots, case.starts)

    def placed() -> torch.Tensor:
        positions = torch.arange(100, 100 + len(case.chosen))
        trees.place(positions, case.starts, laid_out.depths, laid_out.num_nodes)
        return positions

    twin, kernel = both(placed)
    assert torch.equal(kernel, twin)


@pytest.mark.parametrize("seed", range(6))
def test_accepted_rows_move_to_their_depth(seed: int) -> None:
    case = tree_case(seed)
    rows, _ = case.expected(invalid=False)
    path = torch.zeros(len(rows), 8, dtype=torch.int64)
    for r, own in enumerate(rows):
        path[r, : len(own)] = torch.tensor(own)
    ends = case.starts[1:] + 2 * torch.arange(1, len(rows) + 1)  # two prompt tokens each
    query_start_loc = torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])
    num_nodes = torch.tensor([len(tree) for tree in case.trees], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(160, generator=generator)[: int(ends[-1])]
    found = [torch.rand(10, 2, 16, 8, generator=generator) for _ in range(3)]
    expected = [cache.clone() for cache in found]
    KVRows(found).move_paths(path, slots, query_start_loc, num_nodes)
    roots = query_start_loc[1:].long() - 1 - num_nodes
    depths = torch.arange(8)
    moves = (path > depths).nonzero()
    source = slots[roots[moves[:, 0]] + path[moves[:, 0], moves[:, 1]]]
    target = slots[roots[moves[:, 0]] + moves[:, 1]]
    compact_reference(expected, source, target)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)
