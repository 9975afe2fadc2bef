"""``docs/configuration.md`` says what the code says."""

from __future__ import annotations

import inspect
import re

import pytest

from tests.meta.configuration_page import COMMAND, PAGE, page
from vllm_specplugin import SCORERS, ConfigError
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.step.request_options import RequestParser
from vllm_specplugin.utils import env


def test_the_page_is_what_the_script_writes() -> None:
    found, wanted = PAGE.read_text("utf-8").splitlines(), page().splitlines()
    new = [line for line in wanted if line not in found]
    old = [line for line in found if line not in wanted]
    assert found == wanted, f"docs/configuration.md is stale; run: {COMMAND}\n{new=}\n{old=}"


@pytest.mark.parametrize("scorer", SCORERS.names())
def test_every_request_key_is_on_the_page(scorer: str) -> None:
    with pytest.raises(ConfigError, match="only spec_scorer") as caught:
        RequestParser(SpecConfig(scorer=scorer)).parse({"spec_unknown": 1})
    keys = re.findall(r"spec_\w+", str(caught.value).partition("expected only")[2])
    text = PAGE.read_text("utf-8")
    assert [key for key in keys if key != "spec_scorer" and f"| `{key}` |" not in text] == []
    assert len(keys) >= 4


def test_every_variable_is_on_the_page() -> None:
    names = set(re.findall(r'"((?:SPECPLUGIN|VLLM|PROMETHEUS)_\w+)"', inspect.getsource(env)))
    text = PAGE.read_text("utf-8")
    assert [name for name in sorted(names) if f"| `{name}` |" not in text] == []
    assert len(names) >= 5
