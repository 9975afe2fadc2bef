"""Moving rows of paged caches, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplugin.vllm.kv_cache.rows import KVRows, compact, compact_reference

from ..paged import random_parents

LAYOUTS = {
    "per head": lambda *s, **k: torch.empty(s, **k),
    "per token": lambda b, h, s, w, **k: torch.empty(b, s, h, w, **k).transpose(1, 2),
    "a part": lambda b, h, s, w, **k: torch.empty(b, h, s, 2 * w, **k)[..., :w],
}


def caches(
    layout: str = "per head",
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    heads: int = 2,
    width: int = 32,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(layers):
        cache = LAYOUTS[layout](10, heads, 16, width, dtype=dtype)
        raw = cache.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
        made.append(cache)
    return made


def bits(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8).clone()


def accepted_paths(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots ``[requests, 8]`` of the nodes of random accepted paths, and where they
    belong; requests lie in blocks of their own."""
    rng = np.random.default_rng(seed)
    requests, most = 4, 8
    source = torch.full((requests, most), -1, dtype=torch.int64)
    target = source.clone()
    counts = torch.zeros(requests, dtype=torch.int32)
    blocks = rng.permutation(10)
    for r in range(requests):
        parents = random_parents(rng, 14)
        node, path = int(rng.integers(-1, 14)), []
        while node >= 0:
            path.append(node)
            node = parents[node]
        path = path[::-1][:most]
        root = int(rng.integers(0, 16))
        slot = [
            int(blocks[2 * r + (root + 1 + i) // 16]) * 16 + (root + 1 + i) % 16 for i in range(14)
        ]
        for depth, node in enumerate(path):
            source[r, depth], target[r, depth] = slot[node], slot[depth]
        counts[r] = len(path)
        source[r, len(path) :] = 3  # stale: behind the count
        target[r, len(path) :] = 5
    return source, target, counts


@pytest.mark.parametrize("seed", range(12))
def test_accepted_rows_arrive_whole(seed: int) -> None:
    found, expected = caches(), caches()
    slots = accepted_paths(seed)
    compact(found, *slots)
    compact_reference(expected, *slots)
    for a, b in zip(found, expected):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (torch.bfloat16, 32),
        (torch.float8_e4m3fn, 64),
        (torch.uint8, 2 * (16 + 4)),  # a float32 scale behind each token's bytes
        (torch.uint8, 2 * 17),
        (torch.int8, 15),
    ],
)
def test_any_layout_and_type_moves_as_bytes(layout: str, dtype: torch.dtype, width: int) -> None:
    before = caches(layout, dtype, width=width)
    found = caches(layout, dtype, width=width)
    source, target, counts = accepted_paths(1)
    assert (source[0, : counts[0]] != target[0, : counts[0]]).any()
    compact(found, source, target, counts)
    for cache, old in zip(found, before):
        raw, old_raw = bits(cache), bits(old)
        for r, count in enumerate(counts.tolist()):
            for a, b in zip(source[r, :count].tolist(), target[r, :count].tolist()):
                assert torch.equal(raw[b // 16, :, b % 16], old_raw[a // 16, :, a % 16])
                old_raw[b // 16, :, b % 16] = raw[b // 16, :, b % 16]
        assert torch.equal(raw, old_raw)  # and nothing else changed


def test_wide_rows_take_several_programs() -> None:
    found, expected = caches(heads=5, width=900), caches(heads=5, width=900)
    slots = accepted_paths(2)
    compact(found, *slots)
    compact_reference(expected, *slots)
    assert torch.equal(bits(found[2]), bits(expected[2]))


def test_layers_of_different_shapes() -> None:
    mixed = lambda: [*caches(layers=2), *caches(width=8), *caches("per token")]  # noqa: E731
    found, expected = mixed(), mixed()
    rows = KVRows(found)
    for seed in (3, 4):
        rows.move(*accepted_paths(seed))
        compact_reference(expected, *accepted_paths(seed))
    for a, b in zip(found, expected):
        assert torch.equal(bits(a), bits(b))


def test_a_flat_list_without_a_count() -> None:
    found, expected = caches(), caches()
    source, target = torch.tensor([4, 7, 9, -1]), torch.tensor([3, 4, 5, 6])
    compact(found, source, target)
    compact_reference(expected, source, target)
    assert torch.equal(bits(found[0]), bits(expected[0]))
    compact(found, source[:0], target[:0])
    assert torch.equal(bits(found[0]), bits(expected[0]))


def test_rows_in_place_are_not_touched() -> None:
    found, before = caches(), caches()
    slots = torch.arange(12).view(3, 4)
    compact(found, slots, slots.clone(), torch.tensor([4, 4, 4]))
    assert torch.equal(bits(found[0]), bits(before[0]))


def test_the_order_of_depth_matters() -> None:
    """The planted bug: the same moves, deepest first."""
    wrong = 0
    for seed in range(6):
        found, expected = caches(), caches()
        source, target, counts = accepted_paths(seed)
        backwards, places = source.clone(), target.clone()
        for r, count in enumerate(counts.tolist()):
            backwards[r, :count] = source[r, :count].flip(0)
            places[r, :count] = target[r, :count].flip(0)
        compact(found, backwards, places, counts)
        compact_reference(expected, source, target, counts)
        wrong += not torch.equal(bits(found[0]), bits(expected[0]))
    assert wrong > 0
