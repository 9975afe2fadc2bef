"""``GET /specplugin/status``: what is active, and the figures of the last minute.

An endpoint plugin, which vLLM loads only where ``VLLM_PLUGINS`` names it::

    VLLM_PLUGINS=specplugin vllm serve MODEL --spec-proposer suffix

The answer comes from the workers of the first engine, between two of its steps.
"""

from __future__ import annotations

import argparse
from typing import Any

from vllm_specplugin._version import __version__
from vllm_specplugin.config import CONFIG_KEY

__all__ = ["StatusEndpoint"]

PATH = "/specplugin/status"


class StatusEndpoint:
    """See ``vllm/plugins/endpoint_plugins/interface.py``."""

    name = "specplugin"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Adds the route."""

        async def status() -> dict[str, Any]:
            """Configuration, totals and last minute of the plugin."""
            return await self.status(app.state.specplugin_engine)

        app.add_api_route(PATH, status, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: argparse.Namespace) -> None:
        """Remembers how to reach the engine."""
        del args
        state.specplugin_engine = engine_client

    async def status(self, engine_client: Any) -> dict[str, Any]:
        """The answer; ``{"active": false}`` where the plugin is not switched on."""
        found = {"plugin": __version__, "active": False}
        configured = engine_client.vllm_config.additional_config
        if not isinstance(configured, dict) or CONFIG_KEY not in configured:
            return found
        workers = await engine_client.collective_rpc("specplugin_status")
        return {**found, "active": True, **workers[0]}
