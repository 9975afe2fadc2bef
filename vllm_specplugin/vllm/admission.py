"""Checking a request's ``spec_*`` options before vLLM admits it.

vLLM validates sampling parameters in its front end, where a refusal is that
request's HTTP 400 (or the caller's exception, offline). It has no hook for keys
of ``extra_args``, so ``InputProcessor._validate_params`` is wrapped, and only in
processes that configure an engine with this plugin.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from vllm_specplugin.config import CONFIG_KEY, SpecConfig
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.requests import RequestParser

__all__ = ["check_request", "check_requests_from_now_on"]

_MARK = "_specplugin_wrapped"


def check_requests_from_now_on() -> None:
    """Wraps vLLM's validation of sampling parameters. Idempotent."""
    from vllm.v1.engine.input_processor import InputProcessor

    validate = InputProcessor._validate_params
    if getattr(validate, _MARK, False):
        return

    @functools.wraps(validate)
    def with_our_options(self: Any, params: Any, supported_tasks: Any) -> Any:
        check_request(self.vllm_config, params)
        return validate(self, params, supported_tasks)

    setattr(with_our_options, _MARK, True)
    InputProcessor._validate_params = with_our_options  # type: ignore[method-assign]


def check_request(vllm_config: Any, params: Any) -> None:
    """Raises vLLM's ``VLLMValidationError`` for options that are not valid."""
    values = getattr(params, "extra_args", None)
    if not values:
        return
    found = vllm_config.additional_config
    if not isinstance(found, dict) or CONFIG_KEY not in found:
        return
    try:
        _parser(json.dumps(found[CONFIG_KEY], sort_keys=True)).parse(values)
    except ConfigError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="extra_args") from error


@functools.lru_cache(maxsize=8)
def _parser(config: str) -> RequestParser:
    """One per configuration, since making one looks at installed packages."""
    return RequestParser(SpecConfig.from_dict(json.loads(config)))
