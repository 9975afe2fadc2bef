"""The README and the pages in docs/: what they link to and name exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from vllm_specplugin import POLICIES, PROPOSERS, SCORERS, Registry
from vllm_specplugin.telemetry.prometheus import COUNTERS, PREFIX

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = [*FRONT, *DOCS]
FOLDERS = r"(?:vllm_specplugin|proposers|scorers|examples|tests|docs|requirements|\.github|\.ci)"
_PATH = re.compile(rf"(?<![\w./-])({FOLDERS}/[\w./-]*)")
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", path.read_text("utf-8"))


def anchors(path: Path) -> set[str]:
    """Of the headings, where GitHub and mkdocs agree on them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        if (anchor := re.sub(r"[-\s]+", "-", text)) == re.sub(r"\s", "-", text):
            found.add(anchor)
    return found


def dead_links(path: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(path))):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield f"{name(path)}: {link}"
        elif path in DOCS and file not in DOCS:
            yield f"{name(path)}: {link} is not on the site; name the file instead"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert list(dead_links(path)) == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_paths_exist(path: Path) -> None:
    found = {match.rstrip(".") for match in _PATH.findall(path.read_text("utf-8"))}
    assert [one for one in sorted(found) if not (ROOT / one).exists()] == []


def nav_files(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        yield from nav_files(list(entry.values()))
    elif isinstance(entry, list):
        for one in entry:
            yield from nav_files(one)


def test_the_site_has_every_page_once() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(nav_files(settings["nav"])) == [path.name for path in DOCS]
    assert settings["strict"] is True


@pytest.mark.parametrize(
    ("page", "registry"),
    [("proposers.md", PROPOSERS), ("scorers.md", SCORERS), ("policies.md", POLICIES)],
)
def test_every_algorithm_has_a_row(page: str, registry: Registry[object]) -> None:  # type: ignore[type-var]
    text = (ROOT / "docs" / page).read_text("utf-8")
    assert [one for one in registry.names() if f"\n| `{one}` |" not in text] == []


def test_every_metric_has_a_row() -> None:
    text = (ROOT / "docs" / "observability.md").read_text("utf-8")
    assert [one for one, _ in COUNTERS.values() if f"\n| `{PREFIX}{one}` |" not in text] == []


def test_the_readme_is_a_page_long() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
