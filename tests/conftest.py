"""Tiers of tests, and which of them run in the same worker.

Every test is marked by the folder it lies in (``TIERS``), so that ``pytest -m``
chooses by what a test needs. Two marks are set by hand, because they choose
single tests: ``smoke`` (an engine test of the fast tier) and ``nightly`` (the rest
of a grid of which the usual run has a part).

With ``--dist loadgroup`` a group of tests stays in one worker. Tests that share
engines are one group, so each engine starts once per session; all other files
are a group each, so that their fixtures are made once and both workers are busy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_specplugin.tools.engine_client import EngineProcess

HERE = Path(__file__).parent

TIERS: dict[str, tuple[str, ...]] = {
    # The longest match counts.
    "": ("unit",),
    "meta": ("lint",),
    "gpu": ("gpu",),
    "load": ("server", "load"),
    "examples": ("example",),
    "tools/ab/test_end_to_end.py": ("engine",),
    "tools/ab/test_serve_vllm.py": ("server",),
    "vllm": ("adapter",),
    "vllm/cpu_kernels/test_twins.py": ("interpreted",),
    "vllm/cpu_kernels/twins": ("interpreted",),
    "vllm/engines": ("engine",),
    "vllm/second_runner": ("engine",),
    "vllm/second_runner/test_interpreter.py": ("interpreted",),
    "vllm/interpreted": ("interpreted",),
    "vllm/test_interpreted.py": ("interpreted",),
    "vllm/servers": ("server",),
}
SLOWEST_FIRST = ["engine", "interpreted", "server", "gpu", "adapter", "example", "unit", "lint"]
"""A long group that starts last leaves one worker idle."""
ENGINES_OF = ["vllm/engines/test_cpu_kernels", "vllm/second_runner", "vllm"]
"""What has an ``engine`` fixture of its own, the inner ones first."""
LIGHT = {"unit", "example", "lint"}
"""Tiers whose tests must not import vLLM, which takes longer than most of them."""


def tiers(path: Path) -> tuple[str, ...]:
    """The marks of all tests in a file."""
    inside = path.relative_to(HERE)
    names = [inside.as_posix(), *(parent.as_posix() for parent in inside.parents)]
    return next((TIERS[name] for name in names if name in TIERS), TIERS[""])


@pytest.hookimpl(tryfirst=True)  # before -m chooses and before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests and, where they are distributed, groups and orders them."""
    for item in items:
        for name in tiers(item.path):
            item.add_marker(name)
    if not hasattr(config, "workerinput"):
        return
    sharing = {item.path for item in items if "engine" in getattr(item, "fixturenames", ())}
    for item in items:
        inside = item.path.relative_to(HERE)
        group = inside.with_suffix("").as_posix()
        if item.path in sharing:
            group = next(folder for folder in ENGINES_OF if group.startswith(folder))
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: SLOWEST_FIRST.index(tiers(item.path)[0]))


@pytest.fixture(autouse=True)
def light_tests_import_no_vllm(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seen where nothing else in the process has imported it, as in ``make test``."""
    absent = "vllm" not in sys.modules
    yield
    if absent and LIGHT.issuperset(tiers(request.path)):
        assert "vllm" not in sys.modules, "belongs into tests/vllm: it imports vLLM"


Started = dict[str, EngineProcess]
STARTED = pytest.StashKey[list[Started]]()


def keep(config: pytest.Config) -> Started:
    """A place for engines by name, which are ended with the last test of their group."""
    started: Started = {}
    config.stash.setdefault(STARTED, []).append(started)
    return started


def end(started: Started) -> None:
    for one in started.values():
        one.begin_to_close()
    while started:
        started.popitem()[1].close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A group's engines take gigabytes, and the next group has its own."""
    group = item.get_closest_marker("xdist_group")
    if group and nextitem and nextitem.get_closest_marker("xdist_group") != group:
        for started in item.config.stash.get(STARTED, []):
            end(started)
