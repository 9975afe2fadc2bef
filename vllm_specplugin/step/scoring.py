"""One step, several rules: every request is scored by the one it chose.

Where all requests of a step share a rule, which is the rule nearly always, its
scorer gets the batch as it is. Else each rule gets the rows of its requests, and
the results are put together again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_specplugin.api import EngineInfo, Scope, ScoreBatch, ScorerBase, ScoreResult
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.step.request_options import RequestOptions, RequestParser

__all__ = ["RequestScorer", "merge", "take"]

logger = logging.getLogger(__name__)


class RequestScorer:
    """The operator's scorer, and those that requests choose instead.

    Args:
        config: the operator's configuration.
        engine: given to every scorer.
    """

    def __init__(self, config: SpecConfig, engine: EngineInfo) -> None:
        self._config = config
        self._engine = engine
        self._scorers: dict[str, ScorerBase] = {config.scorer: build(config, "scorer", engine)}
        self._parser = RequestParser(config)
        self._choices: dict[str, RequestOptions] = {}

    def admit(self, req_id: str, values: Mapping[str, Any] | None) -> RequestOptions:
        """Called with a new request's ``extra_args``, checked before."""
        try:
            options = self._parser.parse(values)
        except ConfigError as error:
            # Only if it came past the front end, which refuses it.
            logger.warning("request %s is scored by the default: %s", req_id, error)
            options = self._parser.default
        if options != self._parser.default:
            self._choices[req_id] = options
        return options

    def options(self, req_id: str) -> RequestOptions:
        """What an admitted request chose."""
        return self._choices.get(req_id, self._parser.default)

    def scopes(self, req_ids: Sequence[str]) -> list[Scope] | None:
        """With whom requests share what is learnt; ``None`` if all with all."""
        if not self._choices and self._parser.default.scope == "":
            return None
        found = [self.options(req_id).scope for req_id in req_ids]
        return found if any(scope != "" for scope in found) else None

    def release(self, req_ids: Sequence[str]) -> None:
        """Called when requests are gone."""
        for req_id in req_ids:
            self._choices.pop(req_id, None)
        for scorer in self._scorers.values():
            scorer.release(req_ids)

    def emits_draws(self, req_ids: Sequence[str]) -> bool:
        """Whether all of these requests emit what vLLM's sampler draws, if nothing is
        drafted for them."""
        rules = {self.options(r).scorer for r in req_ids} if self._choices else ()
        return all(self._get(rule).emits_draws for rule in rules or (self._config.scorer,))

    def score(self, batch: ScoreBatch) -> ScoreResult:
        if not self._choices:
            return self._scorers[self._config.scorer].score(batch)
        chosen = [self.options(req_id) for req_id in batch.req_ids]
        by_rule: dict[str, list[int]] = {}
        for request, options in enumerate(chosen):
            by_rule.setdefault(options.scorer, []).append(request)
        settings = [options.settings for options in chosen]
        if len(by_rule) == 1:
            (name,) = by_rule
            return self._get(name).score(replace(batch, settings=settings))
        batch = replace(batch, settings=settings)
        parts = []
        for name, requests in by_rule.items():
            part, rows = take(batch, np.array(requests))
            parts.append((requests, rows, self._get(name).score(part)))
        return merge(batch, parts)

    def _get(self, name: str) -> ScorerBase:
        if name not in self._scorers:
            config = replace(self._config, scorer=name, options={})
            self._scorers[name] = build(config, "scorer", self._engine)
        return self._scorers[name]


def take(
    batch: ScoreBatch, requests: npt.NDArray[np.integer]
) -> tuple[ScoreBatch, npt.NDArray[np.int64]]:
    """The part of a batch that belongs to some requests, and its rows."""
    import torch

    counts = np.diff(batch.starts)[requests]
    rows = np.concatenate(
        [np.arange(batch.starts[r], batch.starts[r + 1]) for r in requests]
    ).astype(np.int64)
    place = np.full(len(batch.tokens) + 1, -1, dtype=np.int32)  # [-1] is no parent
    place[rows] = np.arange(len(rows), dtype=np.int32)

    def of_requests(values: Any) -> Any:
        return [values[r] for r in requests] if len(values) else values

    history, choose = batch.history, batch.choose
    index = torch.from_numpy(rows).to(batch.logits.device)
    return (
        replace(
            batch,
            logits=batch.logits[index],
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            tokens=batch.tokens[rows],
            parents=place[batch.parents[rows]],
            positions=batch.positions[rows],
            greedy=batch.greedy[requests],
            seeds=batch.seeds[requests],
            req_ids=of_requests(batch.req_ids),
            settings=of_requests(batch.settings),
            history=None if history is None else lambda r: history(int(requests[r])),
            choose=None if choose is None else lambda: choose()[index],
            draft_probs=batch.draft_probs and batch.draft_probs.take(rows, requests),
        ),
        rows,
    )


def merge(
    batch: ScoreBatch, parts: Sequence[tuple[Sequence[int], npt.NDArray[np.int64], ScoreResult]]
) -> ScoreResult:
    """Puts the results of :func:`take`'s parts together.

    Args:
        batch: the whole.
        parts: per part its requests, its rows, and its result.
    """
    count = len(batch.seeds)
    width = max(result.tokens.shape[1] for _, _, result in parts)
    tokens = np.full((count, width), -1, dtype=np.int32)
    rows = np.repeat(batch.starts[:-1, None], width, axis=1).astype(np.int32)
    lengths = np.empty(count, dtype=np.int32)
    relaxed = np.zeros(count, dtype=np.int32)
    guarded: Counter[str] = Counter()
    for requests, own_rows, result in parts:
        at = np.asarray(requests)
        own = result.tokens.shape[1]
        tokens[at, :own] = result.tokens
        rows[at, :own] = own_rows[result.rows]
        lengths[at] = result.lengths
        if result.relaxed is not None:
            relaxed[at] = result.relaxed
        guarded.update(result.guarded or {})
    return ScoreResult(tokens=tokens, rows=rows, lengths=lengths, relaxed=relaxed, guarded=guarded)
