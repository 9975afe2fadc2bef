"""The tiers name what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import ENGINES_OF, HERE, LIGHT, SLOWEST_FIRST, TIERS, tiers


def test_what_is_named_exists() -> None:
    assert [name for name in TIERS if not (HERE / name).exists()] == []
    assert [name for name in ENGINES_OF if not list(HERE.glob(f"{name}*"))] == []


def test_groups_reach_the_scheduler(request: pytest.FixtureRequest) -> None:
    """Where tests are distributed, those that share engines must stay in one worker."""
    distributed = hasattr(request.config, "workerinput")
    assert request.node.nodeid.endswith("@meta/test_tiers") is distributed


def test_each_tier_has_its_place_in_the_order() -> None:
    assert {marks[0] for marks in TIERS.values()} == set(SLOWEST_FIRST)
    assert set(SLOWEST_FIRST) >= LIGHT


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("trees/test_tree.py", ("unit",)),
        ("test_cli.py", ("unit",)),
        ("vllm/test_args.py", ("adapter",)),
        ("vllm/engines/test_faults.py", ("engine",)),
        ("vllm/second_runner/test_text.py", ("engine",)),
        ("vllm/second_runner/test_interpreter.py", ("interpreted",)),
        ("load/test_soak.py", ("server", "load")),
    ],
)
def test_the_inner_folder_counts(path: str, expected: tuple[str, ...]) -> None:
    assert (HERE / path).is_file()
    assert tiers(Path(HERE / path)) == expected
