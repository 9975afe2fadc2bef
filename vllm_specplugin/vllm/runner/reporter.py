"""What a worker shows of itself while it runs: metrics, a log line, requests.

One per engine (the first rank's), made with the plugin's state. Nothing here
touches the device or waits for another process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.config import SpecConfig
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.telemetry.prometheus import MetricsFile
from vllm_specplugin.telemetry.request_table import Board
from vllm_specplugin.telemetry.window import Rolling, sentence
from vllm_specplugin.utils.env import stats_dir

__all__ = ["Observer"]

logger = logging.getLogger(__name__)

_ROWS_PER_PLACE = 64
"""Requests remembered for each that may run: the front end asks for one when it
ends, within the time of a few others."""


class Observer:
    """A worker's outward statistics.

    Args:
        config: the operator's; ``log_interval``.
        runner: vLLM's, for names and sizes.
        metrics: the totals to show.
    """

    def __init__(self, config: SpecConfig, runner: Any, metrics: SpecMetrics) -> None:
        self._metrics = metrics
        self._interval = config.log_interval
        self._window = Rolling()
        self._logged = Rolling(window=0.0, grain=0.0)
        self._log_due = 0.0
        self._file: MetricsFile | None = None
        self._board: Board | None = None
        self.first_rank = runner.parallel_config.rank == 0
        folder = stats_dir()
        if not self.first_rank or folder is None or not folder.is_dir():
            return
        vllm_config = runner.vllm_config
        self._file = MetricsFile(
            folder,
            {
                "model_name": str(vllm_config.model_config.served_model_name),
                "engine": str(vllm_config.parallel_config.data_parallel_index),
            },
        )
        self._file.write(metrics)
        level = vllm_config.observability_config.per_request_spec_decode_metrics
        if level != "none":
            self._board = Board(folder, _ROWS_PER_PLACE * runner.max_num_reqs)

    def admit(self, req_id: str, scorer: str) -> None:
        """A request came."""
        self._metrics.requests_by_scorer[scorer] += 1
        if self._board is not None:
            self._board.open(req_id, scorer)

    def release(self, req_ids: Sequence[str]) -> None:
        """Requests went."""
        if self._board is not None:
            self._board.release(req_ids)

    def step(
        self,
        req_ids: Sequence[str],
        relaxed: npt.NDArray[np.int32] | None,
        now: float | None = None,
    ) -> None:
        """After each step, once it is counted and before its tokens leave.

        Args:
            req_ids: requests that emitted tokens.
            relaxed: ``[len(req_ids)]`` tokens that only leniency accepted.
            now: seconds of a monotonic clock.
        """
        if self._board is not None and relaxed is not None:
            for req_id, count in zip(req_ids, relaxed.tolist()):
                self._board.add(req_id, count)
        if self._file is not None:
            self._file.write(self._metrics)
        now = time.monotonic() if now is None else now
        self._window.tick(now, self._metrics)
        if self._interval and self.first_rank:
            self._log(now)

    def figures(self) -> dict[str, Any]:
        """The last minute, for whoever asks."""
        return self._window.figures(time.monotonic(), self._metrics)

    def close(self) -> None:
        """Ends writing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _log(self, now: float) -> None:
        if not self._log_due:  # the first step begins the first span
            self._logged.tick(now, self._metrics)
            self._log_due = now + self._interval
        elif now >= self._log_due:
            figures = self._logged.figures(now, self._metrics)
            failures = sum(self._metrics.failures.values())
            logger.info("specplugin, %s", sentence(figures, failures))
            self._logged = Rolling(window=0.0, grain=0.0)
            self._logged.tick(now, self._metrics)
            self._log_due = now + self._interval
