"""What goes wrong while drafting."""

from __future__ import annotations

import logging

from vllm_specplugin.config import SpecConfig
from vllm_specplugin.telemetry.counters import SpecMetrics

__all__ = ["Failures"]

logger = logging.getLogger(__name__)


class Failures:
    """Counts failures of the proposer and the policy, and logs the first of each kind.
    Too many in a row switch drafting off.

    Args:
        config: how many are too many.
        metrics: where to count.
    """

    def __init__(self, config: SpecConfig, metrics: SpecMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._in_row = 0
        self._since = False
        self._logged: set[str] = set()
        self.enabled = True
        """Whether there is drafting."""

    def add(self, kind: str, error: Exception) -> None:
        """Something failed, and costs drafts."""
        self._metrics.failures[kind] += 1
        self._in_row += 1
        self._since = True
        cause = f"{type(error).__name__}: {error}"
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning("drafts lost (%s), counted from now on: %s", kind, cause)
            logger.debug("%s", kind, exc_info=error)
        if self.enabled and self._in_row >= self._config.max_failures:
            self.enabled = False
            self._metrics.failures["disabled"] += 1
            logger.error(
                "proposer %r and policy %r are switched off until restart after "
                "%d failures in a row; the last one was %s: %s. Generation goes on "
                "without drafts.",
                self._config.proposer,
                self._config.policy,
                self._in_row,
                kind,
                cause,
            )

    def end_of_drafting(self) -> None:
        """In a row are failures with no drafting between them that went well."""
        if not self._since:
            self._in_row = 0
        self._since = False
