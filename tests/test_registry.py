from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from vllm_specplugin import (
    EMPTY_TREE,
    ConfigError,
    Needs,
    ProposerBase,
    Registry,
    UnknownNameError,
    registry,
)
from vllm_specplugin.config import construct
from vllm_specplugin.proposers.none import NoProposer
from vllm_specplugin.testing import engine_info


class Mine(ProposerBase):
    def propose(self, ctx):
        return [EMPTY_TREE] * len(ctx.requests)


PATH = f"{__name__}:Mine"


class ByProtocol:
    """Inherits nothing."""

    def __init__(self, config, engine):
        self.config = config

    propose = Mine.propose


@pytest.fixture
def own() -> Registry[ProposerBase]:
    none = "vllm_specplugin.proposers.none:NoProposer"
    return Registry("proposer", "some.group", ProposerBase, {"none": none})


def test_builtin_registered_dotted(own):
    own.register("mine", Mine)
    own.register("mine", Mine)  # again is fine
    assert own.get("none") is NoProposer
    assert own.get("mine") is Mine
    assert own.get(PATH) is Mine
    assert own.get(PATH.replace(":", ".")) is Mine
    assert list(own.names()) == ["mine", "none"]


def test_entry_points(own, monkeypatch):
    found = [EntryPoint("third", PATH, "some.group")]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    assert own.get("third") is Mine
    assert own.names()["third"] == f"entry point {PATH}"


def test_a_class_that_inherits_nothing_gets_the_defaults(own):
    own.register("plain", ByProtocol)
    factory = own.get("plain")
    assert issubclass(factory, ByProtocol) and factory.__name__ == "ByProtocol"
    assert own.get("plain") is factory
    made = construct(factory, None, engine_info())
    assert made.needs == Needs() and made.snapshot() == {} and made.config is None
    made.release(["a"])


def test_its_own_members_win(own):
    own.register("asks", type("Asks", (ByProtocol,), {"needs": Needs(hidden=True)}))
    assert own.get("asks").needs.hidden


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"needs_hidden": True}, r"needs_hidden: .* write needs = Needs\(hidden=True\)"),
        ({"needs_top": 4}, r"needs_top: .* write needs = Needs\(top_tokens=\.\.\.\)"),
        ({"native": True}, r"native: .* write needs = Needs\(vllm_drafter=True\)"),
        ({"knows_scopes": True}, r"knows_scopes: .* write separates_scopes = True"),
        (
            {"needs_hiden": True},
            r"needs_hiden, which .* write needs = Needs\(\.\.\.\) with top",
        ),
        ({"need": Needs(hidden=True)}, r"\.need, which the engine does not know"),
    ],
)
@pytest.mark.parametrize("base", [Mine, ByProtocol])
def test_misspelt_needs_are_refused(own, base, members, message):
    with pytest.raises(ConfigError, match=message):
        own.register("misspelt", type("Misspelt", (base,), members))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"needs_lm_head": True}, r"needs_lm_head: .* write needs = Needs\(lm_head=True\)"),
        ({"needs_hiden": True}, r"needs_hiden, which the engine does not know"),
        ({"needs": {"hidden": True}}, r"needs = {'hidden': True}: expected an instance"),
        ({"needs": Needs(top_tokens=4)}, r"Needs\(top_tokens=4\): expected a method observe_rows"),
    ],
)
def test_misspelt_needs_of_an_instance_are_refused(members, message):
    class Sets(Mine):
        def __init__(self, config, engine):
            vars(self).update(members)

    with pytest.raises(ConfigError, match=message):
        construct(Sets, None, engine_info())


def test_an_unknown_need_is_no_argument():
    with pytest.raises(TypeError, match="hiden"):
        Needs(hiden=True)


def test_missing_methods_are_named(own):
    with pytest.raises(ConfigError, match=r"Nothing without propose\(\): expected the methods of"):
        own.register("nothing", type("Nothing", (), {}))


def test_a_function_is_no_class(own):
    with pytest.raises(ConfigError, match=r"is a function: expected a class"):
        own.get("json:dumps")
    with pytest.raises(ConfigError, match=r"is a function: expected a class"):
        own.register("made", lambda config, engine: None)


@pytest.mark.parametrize("name", ["none", "taken"])
def test_names_are_not_taken_over(own, name):
    own.register("taken", Mine)
    with pytest.raises(ConfigError, match="is taken"):
        own.register(name, type("Other", (Mine,), {}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "expected one of none"),
        ("no_such_module_at_all:X", "importable"),
        ("json:NoSuchClass", "importable"),
        (".", "importable"),
    ],
)
def test_what_cannot_be_found(own, name, message):
    with pytest.raises(UnknownNameError, match=message):
        own.get(name)
