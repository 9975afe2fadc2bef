"""Whose request it is: told apart by API key.

vLLM checks ``Authorization`` against its ``--api-key`` list and passes nothing on.
Where the list has several keys, ``vllm serve`` is given this middleware by its own
``--middleware`` flag. It remembers a digest of the key in the context of the
request, which is where :mod:`.admission` runs.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from vllm_specplugin.config import CONFIG_KEY
from vllm_specplugin.vllm.compat.log_setup import log_as_vllm_does

__all__ = ["MIDDLEWARE", "TenantMiddleware", "add_middleware", "current_tenant"]

logger = logging.getLogger(__name__)

MIDDLEWARE = "vllm_specplugin.vllm.frontend.tenants.TenantMiddleware"

_tenant: ContextVar[str | None] = ContextVar("specplugin_tenant", default=None)
_active = False


class TenantMiddleware:
    """Pure ASGI middleware; refuses nothing, that is vLLM's part."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        global _active
        self._app = app
        _active = True

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        # The first, as vLLM checks it.
        given = (v for k, v in scope["headers"] if k.lower() == b"authorization")
        found = next(given, b"").partition(b" ")[2]
        token = _tenant.set(hashlib.sha256(b"specplugin " + found).hexdigest())
        try:
            await self._app(scope, receive, send)
        finally:
            _tenant.reset(token)


def current_tenant() -> str | None:
    """Who asks; ``None`` where keys are not told apart. A request that comes by a
    way that loses its context shares with nobody."""
    tenant = _tenant.get()
    return secrets.token_hex(16) if tenant is None and _active else tenant


def add_middleware(args: Any) -> None:
    """Has ``vllm serve`` tell requests apart where it was given several API keys.

    Args:
        args: vLLM's parsed command line, changed in place.
    """
    ours = (getattr(args, "additional_config", None) or {}).get(CONFIG_KEY, {})
    if ours.get("cache_scope") != "tenant":
        return
    keys = {key for key in getattr(args, "api_key", None) or () if key}
    listed = getattr(args, "middleware", None)
    if len(keys) < 2 or listed is None or MIDDLEWARE in listed:
        return
    args.middleware = [*listed, MIDDLEWARE]
    log_as_vllm_does()
    logger.info(
        "vllm-specplugin: proposers keep the texts of %d API keys apart (cache_scope=tenant)",
        len(keys),
    )
