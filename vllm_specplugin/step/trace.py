"""Traces: what was drafted, what became of it, and what it cost.

A trace is a gzip file of JSON lines, readable up to where it was cut. The first
line is a header::

    {"schema": 1, "plugin": version, "config": {...}, "engine": {...}}

and each further line is one step that emitted tokens:

=========  ==============================================================
``s``      seconds of the step, from its preparation to its tokens
``t``      of these, from the logits to the tokens (sampling and scoring); on a
           GPU the wait for the forward pass falls into them
``g``      seconds between the drafting before it and its preparation
``d``      seconds of the drafting before it; ``dn``: requests it was for
``p``      prompt tokens computed in the same step
``m``      nodes under the tree mask
``r``      one list per request that emitted: ``[id, context length before,
           temperature > 0, nodes verified, nodes accepted, [tokens]]``
``f``      one list per request drafted for, verified or not: ``[id, context
           length, [tokens], [parents], [estimates x 1000], [kept]]``;
           ``kept`` holds the indices of the verified nodes
=========  ==============================================================

Token ids are replaced by a random permutation of the vocabulary that is drawn
anew for each trace and written nowhere: equal tokens stay equal, texts cannot
be read. Request ids are replaced by numbers.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from vllm_specplugin._version import __version__
from vllm_specplugin.api import EngineInfo, StepOutcome
from vllm_specplugin.errors import ConfigError, SpecPluginError, complain
from vllm_specplugin.step.drafted import Drafted

__all__ = ["SCHEMA", "TraceError", "TraceWriter", "read_trace", "reads_traces"]

logger = logging.getLogger(__name__)

SCHEMA = 1
_FLUSH_STEPS = 20

P = ParamSpec("P")
T = TypeVar("T")


class TraceError(SpecPluginError, ValueError):
    """A file that is not a trace, or one of another version."""


class TraceWriter:
    """Writes a trace; stops at its limit and on a full disk, and says so.

    Args:
        path: the file, overwritten.
        limit_mb: most megabytes to write.
        config: the plugin's configuration.
        engine: the engine.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(
        self, path: Path, limit_mb: float, config: Mapping[str, Any], engine: EngineInfo
    ) -> None:
        self._path = path
        self._limit = int(limit_mb * 1e6)
        self.failed = False
        """Whether the file could not be written to its end."""
        try:
            self._raw = path.open("wb")
        except OSError as error:
            raise ConfigError(
                complain(
                    f"trace file {str(path)!r} ({error})",
                    "a file that can be written",
                    "name one in a folder that exists",
                )
            ) from error
        self._file: gzip.GzipFile | None = gzip.GzipFile(
            fileobj=self._raw, mode="wb", compresslevel=3, mtime=0
        )
        self._hidden = np.random.default_rng().permutation(engine.vocab_size)
        self._numbers: dict[str, int] = {}
        self._steps = 0
        self._write(
            {
                "schema": SCHEMA,
                "plugin": __version__,
                "config": dict(config),
                "engine": {**asdict(engine), "graph_sizes": list(engine.graph_sizes)},
            }
        )

    def step(
        self,
        outcome: StepOutcome,
        emitted: npt.NDArray[np.integer],
        sampled: Mapping[str, bool],
        drafted: Drafted | None,
    ) -> None:
        """Writes one step.

        Args:
            outcome: as the policy sees it.
            emitted: ``[requests, width]`` tokens, padded with -1.
            sampled: whether each request decodes at a temperature.
            drafted: what was drafted before the step, verified or not.
        """
        if self._file is None:
            return
        record: dict[str, Any] = {
            "s": round(outcome.seconds, 6),
            "t": round(outcome.sample_seconds, 6),
            "g": round(outcome.gap_seconds, 6),
            "d": round(outcome.draft_seconds, 6),
            "dn": outcome.draft_requests,
            "p": outcome.prompt_tokens,
            "m": outcome.masked,
            "r": [
                [
                    self._number(req_id),
                    int(outcome.num_tokens[i]),
                    int(sampled.get(req_id, False)),
                    int(outcome.drafted[i]),
                    int(outcome.accepted[i]),
                    self._hidden[emitted[i][emitted[i] >= 0]].tolist(),
                ]
                for i, req_id in enumerate(outcome.req_ids)
            ],
        }
        if drafted is not None:
            record["f"] = list(self._trees(drafted))
        self._write(record)

    def close(self) -> None:
        """Ends the file."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
            self._raw.close()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Ends the file as it is. What is buffered for it cannot be written either."""
        self.failed = True
        logger.warning("trace %s ends here: %s", self._path, error)
        file, self._file = self._file, None
        for one in (file, self._raw):
            with contextlib.suppress(OSError):
                if one is not None:
                    one.close()

    def _trees(self, drafted: Drafted) -> Iterator[list[Any]]:
        forest = drafted.forest
        for req_id, tree in drafted.place.items():
            if not drafted.asked[tree]:
                continue
            first, end = int(forest.starts[tree]), int(forest.starts[tree + 1])
            parents = forest.parents[first:end]
            estimates = np.rint(forest.estimates[first:end] * 1000).astype(int)
            yield [
                self._number(req_id),
                int(drafted.ends[tree]),
                self._hidden[forest.tokens[first:end]].tolist(),
                np.where(parents >= 0, parents - first, -1).tolist(),
                estimates.tolist(),
                np.flatnonzero(drafted.kept[first:end]).tolist(),
            ]

    def _number(self, req_id: str) -> int:
        return self._numbers.setdefault(req_id, len(self._numbers))

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            line = json.dumps(record, separators=(",", ":")) + "\n"
            self._file.write(line.encode())
            self._steps += 1
            if self._steps % _FLUSH_STEPS == 1:
                self._file.flush()
            if self._raw.tell() > self._limit:
                logger.warning("trace %s has reached its limit and ends here", self._path)
                self.close()
        except OSError as error:
            self._lost(error)


def read_trace(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and steps. A trace that was cut off is read up to there.

    Raises:
        TraceError: the file is missing, no trace, or of another version.
    """
    lines: list[dict[str, Any]] = []
    try:
        with gzip.open(path, "rt") as file:
            lines.extend(json.loads(line) for line in file)
    except (EOFError, ValueError, OSError, zlib.error) as error:
        if not lines:
            raise TraceError(
                complain(f"{path}: {error}", "a trace written with --spec-trace", "check the path")
            ) from error
    if not all(isinstance(line, dict) for line in lines):
        lines = [{"schema": "of something else"}]
    if not lines or lines[0].get("schema") != SCHEMA:
        found = lines[0].get("schema") if lines else "nothing"
        raise TraceError(
            complain(
                f"{path}: schema {found!r}",
                f"schema {SCHEMA}",
                "record the trace anew with this version",
            )
        )
    return lines[0], lines[1:]


def reads_traces(function: Callable[P, T]) -> Callable[P, T]:
    """For functions that use what :func:`read_trace` returns: where a line is not
    what it should be, that is a :class:`TraceError`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TraceError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise TraceError(
                complain(
                    f"a trace with a damaged line ({type(error).__name__}: {error})",
                    "a trace as --spec-trace writes it",
                    "record it anew",
                )
            ) from error

    return call
