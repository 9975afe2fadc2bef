"""Every wrong setting stops with value, expectation and remedy."""

from __future__ import annotations

import json

import pytest

from vllm_specplugin import ConfigError, UnknownNameError
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.utils.env import cache_dir


def flags(**changes):
    return SpecConfig.from_flags(
        **{
            "proposer": "suffix",
            "scorer": "exact",
            "policy": "fixed",
            "max_nodes": 16,
            "options": {},
        }
        | changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposer": "sufix"}, "proposer 'sufix': expected one of"),
        ({"scorer": "typicl"}, "scorer 'typicl'"),
        ({"policy": "no.such:Policy"}, r"policy 'no.such:Policy' at"),
        ({"policy": "math:pi"}, "is a float: expected a class"),
        ({"max_nodes": 0}, "max_nodes=0: expected a value from 1 to 64"),
        ({"max_nodes": 65}, "max_nodes=65"),
        ({"max_nodes": True}, "max_nodes=True: expected a value of type int"),
        ({"max_nodes": "8"}, "max_nodes='8': expected a value of type int"),
        ({"options": []}, "spec options"),
        ({"options": {"propser": {}}}, "has no 'propser'"),
        ({"options": {"proposer": {"min_mach": 2}}}, "has no 'min_mach'"),
        ({"options": {"proposer": {"min_survival": 2.0}}}, "min_survival=2.0"),
        ({"options": {"proposer": {"min_survival": float("nan")}}}, "=nan"),
        ({"options": {"proposer": {"coupled": 1}}}, "coupled=1"),
        ({"options": {"proposer": 3}}, "suffix options 3"),
        ({"options": {"scorer": {"epsilon": 0.1}}}, "for 'exact': expected no options"),
        ({"options": {"draft_timeout_ms": 0}}, "draft_timeout_ms=0"),
        ({"options": {"max_failures": 1.5}}, "max_failures=1.5"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        flags(**changes)
    assert "expected" in str(caught.value)
    assert "To fix it" in str(caught.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"ngram, none, suffix"):
        flags(proposer="x")


def test_it_survives_json_and_its_own_dict_form():
    config = flags(max_nodes=8, options={"proposer": {"min_survival": 0.5}, "draft_timeout_ms": 20})
    assert config.draft_timeout_ms == 20.0
    assert SpecConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.options == {"proposer": {"min_survival": 0.5}}


def test_cache_dir_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECPLUGIN_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("SPECPLUGIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "vllm-specplugin"
