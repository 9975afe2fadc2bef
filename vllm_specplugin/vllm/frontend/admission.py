"""Checking a request's ``spec_*`` options before vLLM admits it.

vLLM validates sampling parameters in its front end, where a refusal is that
request's HTTP 400 (or the caller's exception, offline). It has no hook for keys
of ``extra_args``, so ``InputProcessor._validate_params`` is wrapped, and only in
processes that configure an engine with this plugin.

``InputProcessor.process_inputs`` is wrapped too: only there are a request's
``cache_salt`` and its parameters seen together. Workers are told the scope that
follows from them (:func:`vllm_specplugin.step.request_options.cache_scope`), never the salt or
the API key.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from vllm_specplugin.config import CONFIG_KEY, SpecConfig
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.step.request_options import SCOPE_KEY, RequestParser, cache_scope
from vllm_specplugin.vllm.frontend.tenants import current_tenant

__all__ = ["check_request", "check_requests_from_now_on", "scoped"]

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

    process = InputProcessor.process_inputs

    @functools.wraps(process)
    def with_scope(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if (params := request.sampling_params) is not None:
            found = scoped(self.vllm_config, params.extra_args, request.cache_salt)
            params.extra_args = found
        return request

    setattr(with_our_options, _MARK, True)
    InputProcessor._validate_params = with_our_options  # type: ignore[method-assign]
    InputProcessor.process_inputs = with_scope  # type: ignore[method-assign]


def check_request(vllm_config: Any, params: Any) -> None:
    """Raises vLLM's ``VLLMValidationError`` for options that are not valid."""
    values = getattr(params, "extra_args", None)
    if not values:
        return
    found = _ours(vllm_config)
    if found is None:
        return
    try:
        _parser(json.dumps(found, sort_keys=True)).parse(values)
    except ConfigError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="extra_args") from error


def scoped(
    vllm_config: Any, values: dict[str, Any] | None, salt: str | None
) -> dict[str, Any] | None:
    """A request's ``extra_args`` with the scope that the workers are to keep it in.

    Args:
        vllm_config: of the engine.
        values: the request's ``extra_args``, checked; left as they are.
        salt: its ``cache_salt``.
    """
    found = _ours(vllm_config)
    if found is None:
        return values
    name = (values or {}).get(SCOPE_KEY, "")
    apart = found.get("cache_scope", "tenant") == "tenant"
    tenant = current_tenant() if apart else None
    scope = cache_scope(name, salt if apart else None, tenant)
    return {**(values or {}), SCOPE_KEY: scope} if scope else values


def _ours(vllm_config: Any) -> dict[str, Any] | None:
    found = vllm_config.additional_config
    ours = found.get(CONFIG_KEY) if isinstance(found, dict) else None
    return ours if isinstance(ours, dict) else None


@functools.lru_cache(maxsize=8)
def _parser(config: str) -> RequestParser:
    """One per configuration, since making one looks at installed packages."""
    return RequestParser(SpecConfig.from_dict(json.loads(config)))
