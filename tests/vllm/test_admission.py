"""Options of requests are checked before vLLM admits them, where we are on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_specplugin.config import CONFIG_KEY, SpecConfig
from vllm_specplugin.vllm.frontend.admission import check_request, check_requests_from_now_on


def config(additional):
    return SimpleNamespace(additional_config=additional)


ON = config({CONFIG_KEY: SpecConfig(request_scorers=["typical"]).to_dict()})


def params(**values):
    return SimpleNamespace(extra_args=values or None)


@pytest.mark.parametrize("good", [{}, {"other": 1}, {"spec_scorer": "typical"}])
def test_good_options_pass(good):
    check_request(ON, params(**good))


def test_bad_options_are_the_requests_fault():
    with pytest.raises(VLLMValidationError, match="spec_scorer='fly': expected one of"):
        check_request(ON, params(spec_scorer="fly"))


@pytest.mark.parametrize("off", [{}, {"other": {}}, None])
def test_where_the_plugin_is_off_nothing_is_checked(off):
    check_request(config(off), params(spec_scorer="fly"))


def test_parameters_of_pooling_have_no_extra_arguments():
    check_request(ON, SimpleNamespace())


def test_vllm_is_wrapped_once(monkeypatch):
    from vllm.v1.engine.input_processor import InputProcessor

    plain = InputProcessor._validate_params
    monkeypatch.setattr(InputProcessor, "_validate_params", plain)
    check_requests_from_now_on()
    wrapped = InputProcessor._validate_params
    check_requests_from_now_on()
    assert InputProcessor._validate_params is wrapped
    assert wrapped.__wrapped__ is getattr(plain, "__wrapped__", plain)
    with pytest.raises(VLLMValidationError, match="spec_max_nodes=-1"):
        wrapped(SimpleNamespace(vllm_config=ON), params(spec_max_nodes=-1), ())
