from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from vllm_specplugin import ConfigError, UnknownNameError, registry
from vllm_specplugin.registry import Registry


class Mine:
    def __init__(self, config, engine):
        pass


@pytest.fixture
def own() -> Registry:
    return Registry("proposer", "some.group", {"none": "json:JSONDecoder"})


def test_builtin_registered_dotted(own):
    import json

    own.register("mine", Mine)
    own.register("mine", Mine)  # again is fine
    assert own.get("none") is json.JSONDecoder
    assert own.get("mine") is Mine
    assert own.get("json:JSONEncoder") is json.JSONEncoder
    assert own.get("json.JSONEncoder") is json.JSONEncoder
    assert list(own.names()) == ["mine", "none"]


def test_entry_points(own, monkeypatch):
    found = [EntryPoint("third", "json:JSONEncoder", "some.group")]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    assert own.get("third").__name__ == "JSONEncoder"
    assert own.names()["third"] == "entry point json:JSONEncoder"


@pytest.mark.parametrize("name", ["none", "taken"])
def test_names_are_not_taken_over(own, name):
    own.register("taken", Mine)
    with pytest.raises(ConfigError, match="is taken"):
        own.register(name, type("Other", (), {}))


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
