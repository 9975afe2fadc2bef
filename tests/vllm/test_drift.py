"""What the plugin relies on in vLLM: all of it is listed, and as listed."""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.meta import vllm_names
from vllm_specplugin import UnsupportedError
from vllm_specplugin.vllm import doctor
from vllm_specplugin.vllm.compat import seams
from vllm_specplugin.vllm.compat.seam_list import SEAMS, Seam

ROOT = Path(__file__).resolve().parents[2]
OURS = {
    # Our own objects where they are typed Any, and our own attributes on vLLM's.
    "_plan": "a method of the first runner's mixin",
    "kv_cache_update_bypass": "in 0.33 only, read in compat/versions.py",
    "hidden_size": "of a Hugging Face configuration",
    "requests": "a tree attention plan's",
    "rows": "a tree attention plan's",
    "starts": "a step layout's",
    "state": "of Starlette's application",
}
SENT = {"broadcast_object"}
"""What these return is what we sent."""


# ------------------------------------------------------------- the list is complete


@pytest.fixture(scope="module")
def used() -> set[vllm_names.Use]:
    folder = ROOT / "vllm_specplugin" / "vllm"
    names = vllm_names.defined(vllm_names.vllm_root())
    return vllm_names.uses(sorted(folder.rglob("*.py")), names, ROOT)


def unlisted(used: set[vllm_names.Use], listed: dict[str, Seam]) -> list[str]:
    """Uses that no seam covers, as sentences."""
    called = {path.split(":")[1].split(".")[-1]: s for path, s in listed.items() if ":" in path}
    known = set(called) | {name for s in listed.values() for name in (*s.has, *(s.takes or ()))}
    found = []
    for use in sorted(used):
        if use.name in OURS:
            continue
        seam = called.get(use.name)
        if use.name not in known:
            found.append(f"{use.where}: {use.name} is {use.how}, but not listed")
        elif use.how == "overridden" and not (seam and (seam.ours or seam.takes == ("self",))):
            found.append(f"{use.where}: {use.name} is overridden, but listed without ours=")
        elif (
            use.how == "unpacked"
            and use.name not in SENT
            and not (seam and seam.gives == use.values)
        ):
            found.append(f"{use.where}: {use.name} unpacked to {use.values}, gives= differs")
    return found


def test_every_name_of_vllms_that_is_used_is_listed(used):
    assert unlisted(used, dict(SEAMS)) == []


def test_every_import_is_listed():
    listed = set(SEAMS)
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {module}:{name}"
        for path in sorted((ROOT / "vllm_specplugin").rglob("*.py"))
        for module, name, line in vllm_names.imports(path)
        if not any(one.startswith((f"{module}:{name}", f"{module}.{name}:")) for one in listed)
        and f"{module.rpartition('.')[0]}:{module.rpartition('.')[2]}" not in listed
    ]
    assert missing == []


def test_imports_of_the_tests_exist():
    """But for those that a test expects to fail, in ``try``."""
    gone = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.is_relative_to(ROOT / "tests" / "gpu"):
            continue
        for module, name, line in vllm_names.imports(path):
            try:
                found = importlib.import_module(module)
                if name is not None and not hasattr(found, name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError as error:
                gone.append(f"{path.relative_to(ROOT)}:{line}: {error}")
    assert gone == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(states: Any):\n    k, p = states.get_top_k_top_p(1, 2)", ("called", "unpacked")),
        ("def f(runner: Any):\n    runner.sampler.sampling_states.get_top_k_top_p", ("read",)),
        ("from vllm.x import a\ndef f():\n    a().get_top_k_top_p(1)", ("called",)),
        (
            "class A:\n    def __init__(self, r: Any):\n        self._r = r\n"
            "    def f(self):\n        for one in self._r.requests:\n"
            "            getattr(one, 'get_top_k_top_p', None)",
            ("read",),
        ),
        (
            "class A:\n    def get_top_k_top_p(self):\n        return super().get_top_k_top_p()",
            ("called", "overridden"),
        ),
        ("def f(spec: SpecState):\n    spec.get_top_k_top_p()", ()),
    ],
)
def test_the_walk_sees_uses(source, expected, tmp_path):
    file = tmp_path / "one.py"
    file.write_text(source)
    names = frozenset({"get_top_k_top_p", "sampler", "sampling_states", "requests"})
    found = vllm_names.uses([file], names, tmp_path)
    assert tuple(sorted(u.how for u in found if u.name == "get_top_k_top_p")) == expected


def test_an_unlisted_name_is_named(used):
    short = {path: s for path, s in SEAMS.items() if "apply_sampling_params" not in path}
    (problem,) = unlisted({use for use in used if use.name == "apply_sampling_params"}, short)
    assert "sampling.py" in problem and "apply_sampling_params is called" in problem


# -------------------------------------------------- the installed vLLM is as listed


def test_the_installed_vllm_is_as_expected():
    assert seams.drift() == []


def test_functions_are_written_as_where_they_were_read():
    """If this fails after an update of vLLM: read what changed, then pin it anew
    with tests/meta/pin_seams.py."""
    release, changed = seams.changed_bodies()
    assert changed == [], f"differ from {release}"


@pytest.fixture
def planted(monkeypatch) -> ModuleType:
    """A module of vLLM's, as it were."""
    module = ModuleType("vllm.planted")
    monkeypatch.setitem(sys.modules, "vllm.planted", module)
    return module


def named(monkeypatch, *expected: Seam) -> list[str]:
    monkeypatch.setattr(seams, "SEAMS", {seam.path: seam for seam in expected})
    return seams.drift()


def test_a_change_is_named(monkeypatch):
    changed, gone, renamed = named(
        monkeypatch,
        Seam("vllm.v1.outputs:SamplerOutput", ("sampled_token_ids", "logits")),
        Seam("vllm.v1.outputs:NoSuchThing"),
        Seam("vllm.v1.sample.sampler:Sampler.compute_logprobs", ("x",)),
    )
    assert "SamplerOutput takes" in changed
    assert "expected ('sampled_token_ids', 'logits')" in changed
    assert "NoSuchThing is gone" in gone
    assert "compute_logprobs takes" in renamed


def test_a_required_field_in_the_middle_is_named(monkeypatch, planted):
    @dataclass
    class Batch:
        req_ids: list[str]
        num_pages: int
        positions: Any

    planted.Batch = Batch
    (problem,) = named(monkeypatch, Seam("vllm.planted:Batch", ("req_ids", "positions")))
    assert "requires num_pages" in problem


def three_values(states: Any, slots: Any) -> tuple[Any, Any, bool]:
    return states, slots, True


def unannotated(states, slots):
    if slots is None:
        return states, None
    return states, slots


def test_another_number_of_values_is_named(monkeypatch, planted):
    planted.limits, planted.plain = three_values, unannotated
    (problem,) = named(monkeypatch, Seam("vllm.planted:limits", ("states", "slots"), gives=2))
    assert problem == "vllm.planted:limits returns 3 values, expected 2"
    assert named(monkeypatch, Seam("vllm.planted:plain", gives=2)) == []


class Runner:
    def __init__(self) -> None:
        self.input_batch = None


def test_an_attribute_that_is_gone_is_named(monkeypatch, planted):
    planted.Runner = Runner
    seam = Seam("vllm.planted:Runner", has=("drafter", "input_batch"))
    assert named(monkeypatch, seam) == ["vllm.planted:Runner has no drafter"]


def plain(logits, k, p):
    """As the plugin's replacement was before 0.33."""


def with_hint(logits, k, p, has_topp_only_rows=True):
    """As vLLM 0.33's."""


def swallows(logits, k, p, **hints):
    """As the plugin's replacement is."""


def other_order(logits, p, k, **hints):
    """Wrong."""


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (plain, with_hint, "has_topp_only_rows="),
        (swallows, with_hint, None),
        (other_order, with_hint, "k as argument 2"),
        (plain, plain, None),
        (with_hint, plain, None),
    ],
)
def test_what_an_override_does_not_take_is_named(ours, theirs, expected):
    assert seams.refuses(ours, theirs) == expected


def test_every_override_of_ours_exists():
    for seam in SEAMS.values():
        if seam.ours:
            module, _, name = seam.ours.partition(":")
            source = importlib.import_module(module).__file__
            defined = {
                node.name
                for node in ast.walk(ast.parse(Path(str(source)).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert name.rpartition(".")[2] in defined, seam.ours


def test_doctor_fails_where_something_differs(monkeypatch):
    named(monkeypatch, Seam("vllm.v1.outputs:NoSuchThing"))
    (finding,) = doctor._seams()
    assert finding.bad and "NoSuchThing is gone" in finding.text


def test_doctor_tells_of_functions_that_were_rewritten(monkeypatch):
    monkeypatch.setattr(doctor, "drift", list)
    monkeypatch.setattr(doctor, "changed_bodies", lambda: ("0.33.0", ["vllm.x:f"]))
    first, second = doctor._seams()
    assert not first.bad and "as expected" in first.text
    assert not second.bad and second.text == "vllm.x:f is not written as in vLLM 0.33.0"


# ------------------------------------------------------------------------ versions


@pytest.mark.parametrize("found", ["0.31.4", "0.34.0", "1.32.0", None])
def test_other_versions_stop_with_the_supported_ones(monkeypatch, found):
    monkeypatch.setattr(seams, "installed_version", lambda: found)
    with pytest.raises(UnsupportedError, match=r"expected vLLM 0\.32\.x or 0\.33\.x") as caught:
        seams.check_version()
    assert str(found or "(not installed)") in str(caught.value)
    assert "install vllm" in str(caught.value)


@pytest.mark.parametrize("found", ["0.32.7", "0.33.0", "0.33.0+cpu"])
def test_patch_releases_are_fine(monkeypatch, found):
    monkeypatch.setattr(seams, "installed_version", lambda: found)
    seams.check_version()
