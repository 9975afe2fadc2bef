"""What the plugin adds to vLLM's front end, where requests come and responses go.

Called in processes that configure an engine with the plugin, and idempotent:

- workers' counters appear in this process's ``/metrics`` (and in
  ``LLM.get_metrics()``);
- with ``--per-request-spec-decode-metrics``, the statistics that vLLM adds to a
  response also name the rule and count what only its leniency accepted.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_specplugin.telemetry.request_table import look_up
from vllm_specplugin.utils.env import make_stats_dir, shared_stats_dir, stats_dir

__all__ = ["show_statistics"]

_MARK = "_specplugin_wrapped"


def show_statistics() -> None:
    """Makes workers' statistics visible in this process."""
    from vllm.v1.engine.output_processor import OutputProcessor

    process = OutputProcessor.process_outputs
    if getattr(process, _MARK, False):
        return
    _collect()

    @functools.wraps(process)
    def with_our_statistics(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            if output.spec_decode_metrics is not None:
                output.spec_decode_metrics = _extended(output)
        return process(self, engine_core_outputs, *args, **kwargs)

    setattr(with_our_statistics, _MARK, True)
    OutputProcessor.process_outputs = with_our_statistics  # type: ignore[method-assign]


def _collect() -> None:
    """Several API servers share a folder of Prometheus's, which vLLM reads as it
    is; a single one is told to read ours."""
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    folder = make_stats_dir()
    if folder != shared_stats_dir():
        MultiProcessCollector(REGISTRY, path=str(folder))


def _extended(output: Any) -> Any:
    folder = stats_dir()
    ours = None if folder is None else look_up(folder, output.request_id)
    theirs = output.spec_decode_metrics
    return theirs if ours is None else _metrics_class()(theirs, ours)


@functools.lru_cache(maxsize=1)
def _metrics_class() -> type:
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    class RequestMetrics(RequestSpecDecodeMetrics):
        """vLLM's per-request statistics with the plugin's beside them."""

        def __init__(self, theirs: RequestSpecDecodeMetrics, ours: Any) -> None:
            super().__init__(**vars(theirs))
            self.specplugin = ours

        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), **self.specplugin}

    return RequestMetrics
