"""What vLLM builds for ``method="custom_class"``.

vLLM wants an object with ``propose`` and, on CPU, ``load_model``. Our runner
drafts by itself, with the whole context, and never calls ``propose``: the
object only checks that our worker is there.
"""

from __future__ import annotations

from typing import Any, NoReturn

from vllm_specplugin.errors import UnsupportedError, complain
from vllm_specplugin.vllm.frontend.args import WORKER

__all__ = ["PluginDrafter"]


class PluginDrafter:
    """Stands in for vLLM's drafter.

    Raises:
        UnsupportedError: the engine was not given our worker.
    """

    def __init__(self, vllm_config: Any) -> None:
        found = vllm_config.parallel_config.worker_cls
        if found != WORKER:
            raise UnsupportedError(
                complain(
                    f"worker_cls={found!r}",
                    f"worker_cls={WORKER!r}",
                    "pass all arguments that speculate() returns, or use the --spec-proposer flag",
                )
            )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def propose(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            complain(
                "vLLM's runner asked for drafts itself",
                "the plugin's runner",
                "run `specplugin doctor`",
            )
        )
