"""What a step costs: T(tokens, requests, context), learnt from measured steps.

A step's time is linear in known features of it: a constant, the tokens
scheduled (piecewise linear, so that the knee where verification stops being
free can be found), whether there are drafts at all, the requests, the tokens each
row attends to, and the rows that need the tree mask. The coefficients are a
Bayesian linear regression in information form: each step adds a rank-one term, old
steps fade towards the prior, and a step far from what is expected (another process
took the core, an engine compiled something) weighs less, as in Huber's estimator.

Decisions need *relative* prices only, so the prior is stated relative to the
first steps measured, and holds on a laptop and on an H200 alike: a token is
presumed to cost little until measured otherwise.

Sources of the shape: T as an affine function of context and batched tokens is
SmartSpec's (2406.14066); steps that are padded to captured CUDA graph sizes
cost what the padded size costs, as vLLM's own adaptive verification prices them
(``vllm/v1/worker/gpu/spec_decode``).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["LinearTime", "StepShape", "StepTimeModel", "UsesStepTimes", "call_time"]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

_KNOTS = np.array([4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
_LEARN_STEPS = 8
_SCHEMA = 2


class LinearTime:
    """Seconds as a linear function of features, learnt online.

    Args:
        mean: prior mean of each coefficient, in units of the time scale.
        spread: prior standard deviation of each.
        memory: steps after which an old one counts for 1/e.
        noise: relative standard deviation of one measurement.
        opening: measurements that set the scale together.
    """

    def __init__(
        self,
        mean: Floats,
        spread: Floats,
        *,
        memory: float = 1000.0,
        noise: float = 0.1,
        opening: int = 4,
    ) -> None:
        self._prior = np.diag(spread**-2.0)
        self._prior_moment = self._prior @ mean
        self._information: Floats = self._prior.copy()
        self._moment = self._prior_moment.copy()
        self._coefficients = mean.astype(np.float64)
        self._keep = 1.0 - 1.0 / memory
        self._noise = noise
        self._opening: list[tuple[Floats, float, float]] = []
        self._open = opening
        self._stale = False
        self.scale: float | None = None
        """Seconds per unit; ``None`` until the first steps were seen."""
        self.observed = 0
        self.error = 0.0
        """Mean absolute relative error of predictions, before learning from
        the step; recent steps count more."""

    def relative(self, features: Floats) -> Floats:
        """Predicted time in units of the scale; ``features`` is ``[..., k]``."""
        return np.asarray(features @ self._coefficients)

    def coefficient(self, index: int) -> float:
        """One coefficient, in units of the scale."""
        return float(self._coefficients[index])

    def seconds(self, features: Floats) -> Floats:
        """Predicted seconds; zero until the scale is known."""
        return np.maximum(self.relative(features), 0.0) * (self.scale or 0.0)

    def observe(self, features: Floats, seconds: float, weight: float = 1.0) -> None:
        """Learns from one measurement."""
        if not (np.isfinite(seconds) and seconds > 0):
            return
        if self.scale is None:
            # The scale has to be robust: first steps pay for compilation. It is
            # set so that the prior is right about the quickest of them.
            self._opening.append((features, seconds, weight))
            if len(self._opening) < self._open:
                return
            self.scale = min(
                took / max(float(self.relative(step)), 1e-3) for step, took, _ in self._opening
            )
            opening, self._opening = self._opening, []
            for measured in opening:
                self.observe(*measured)
                self.refresh()
            return
        expected = max(float(self.relative(features)), 0.05)
        value = seconds / self.scale
        off = abs(value - expected) / expected
        self.observed += 1
        share = max(1.0 / self.observed, 1.0 / 200)
        self.error += share * (min(off, 1.0) - self.error)
        bound = 3 * self._noise
        if off > bound:
            weight *= bound / off
        weight /= (self._noise * expected) ** 2
        keep = self._keep
        self._information *= keep
        self._information += (1 - keep) * self._prior
        self._information += weight * np.outer(features, features)
        self._moment *= keep
        self._moment += (1 - keep) * self._prior_moment + weight * value * features
        self._stale = True

    def refresh(self) -> None:
        """Makes predictions take in what was observed."""
        if self._stale:
            self._stale = False
            self._coefficients = np.asarray(
                np.linalg.solve(self._information, self._moment), dtype=np.float64
            )

    def state(self) -> dict[str, Any]:
        """Plain data for :meth:`restore`."""
        return {
            "scale": self.scale,
            "information": self._information.tolist(),
            "moment": self._moment.tolist(),
            "observed": self.observed,
            "error": self.error,
        }

    def restore(self, state: Mapping[str, Any], strength: float = 50.0) -> None:
        """Starts from an earlier run, whose evidence is made worth at most
        ``strength`` steps: the machine may have changed since.

        Raises:
            ValueError: the state does not fit this model.
        """
        information = np.asarray(state["information"], dtype=np.float64)
        moment = np.asarray(state["moment"], dtype=np.float64)
        scale = float(state["scale"])
        fits = information.shape == self._prior.shape and moment.shape == (len(self._prior),)
        if not fits or not (
            np.isfinite(information).all()
            and np.isfinite(moment).all()
            and np.isfinite(scale)
            and scale > 0
        ):
            raise ValueError("coefficients of another shape, or not finite")
        coefficients: Floats = np.asarray(np.linalg.solve(information, moment), dtype=np.float64)
        share = min(1.0, strength / max(1, int(state["observed"])))
        # Less evidence, same best guess.
        self._information = self._prior + share * (information - self._prior)
        self._moment = self._information @ coefficients
        self._coefficients = coefficients
        self.scale = scale


def call_time() -> LinearTime:
    """What a call of a proposer takes, of the features 1 and requests: known from
    the first on, most of it presumed to be there for one request too."""
    return LinearTime(np.array([0.85, 0.15]), np.array([0.5, 0.3]), noise=0.3, opening=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What is known of a step before it runs.

    Fields may be arrays of alternatives.
    """

    requests: Any
    nodes: Any
    """Draft nodes verified."""
    attended: Any
    """Thousands of tokens attended to, summed over rows."""
    masked: Any = 0
    """Rows under a tree mask."""
    prompt: Any = 0
    """Prompt tokens computed beside."""


class StepTimeModel:
    """T of a step, and the time of drafting.

    Args:
        graph_sizes: token counts that steps are padded to, ascending; none
            where steps run at their own size.
    """

    def __init__(self, graph_sizes: Sequence[int] = ()) -> None:
        self._graph_sizes = np.array(sorted(graph_sizes), dtype=np.float64)
        knots = len(_KNOTS)
        #              1    tokens  bends    drafts  requests  attended  masked
        mean = [0.95, 0.01, *[0.0] * knots, 0.0, 0.005, 0.005, 0.003]
        spread = [0.5, 0.03, *[0.02] * knots, 0.2, 0.02, 0.02, 0.01]
        self._step = LinearTime(np.array(mean), np.array(spread))
        self._draft = call_time()
        self._gap = LinearTime(np.array([0.5, 0.1]), np.array([0.5, 0.2]), noise=0.3)
        self._unlearnt: list[tuple[StepShape, float, float]] = []
        self.largest = 0
        """Most tokens of any step seen."""

    @property
    def ready(self) -> bool:
        """Whether predictions rest on measurements."""
        return self._step.scale is not None

    @property
    def error(self) -> float:
        """Mean absolute relative error of recent predictions of steps."""
        return self._step.error

    def observe(self, shape: StepShape, seconds: float, gap: float) -> None:
        """Learns from a step.

        Args:
            shape: the step.
            seconds: from its preparation to its sampled tokens.
            gap: since the end of the drafting before it; capped, as an engine
                without requests waits.
        """
        if not (np.isfinite(seconds) and seconds > 0):
            return
        tokens = shape.requests + int(shape.nodes) + shape.prompt
        self.largest = max(self.largest, tokens)
        self._unlearnt.append((shape, seconds, gap))
        # A step that drafts nothing must not pay for learning from it.
        if len(self._unlearnt) >= _LEARN_STEPS or not self.ready:
            self.learn()

    def learn(self) -> None:
        """Takes in the steps observed since the last time."""
        if not self._unlearnt:
            return
        steps, self._unlearnt = self._unlearnt, []
        features = self._features(
            StepShape(
                requests=np.array([shape.requests for shape, *_ in steps]),
                nodes=np.array([shape.nodes for shape, *_ in steps]),
                attended=np.array([shape.attended for shape, *_ in steps]),
                masked=np.array([shape.masked for shape, *_ in steps]),
                prompt=np.array([shape.prompt for shape, *_ in steps]),
            )
        )
        for row, (shape, seconds, gap) in zip(features, steps):
            # Rows of prompts are cheaper than rows with logits: they say
            # roughly what tokens cost, before anything was drafted.
            weight = 0.02 if shape.prompt else 1.0
            self._step.observe(row, seconds, weight)
            self._gap.observe(np.array([1.0, shape.requests]), min(gap, 0.5 * seconds))
        self._step.refresh()
        self._gap.refresh()

    def observe_draft(self, requests: int, seconds: float) -> None:
        """Learns from a call of the proposer."""
        self._draft.observe(np.array([1.0, requests]), seconds)
        self._draft.refresh()

    def seconds(self, shape: StepShape) -> Floats:
        """Predicted seconds of a step, host time around it included; in
        relative units until :attr:`ready`. Never decreasing in ``nodes`` where
        they are given in ascending order."""
        relative = self._step.relative(self._features(shape))
        relative = np.maximum.accumulate(np.maximum(np.atleast_1d(relative), 0.05))
        gap = self._gap.seconds(np.array([1.0, shape.requests]))
        return np.asarray(relative * (self._step.scale or 1.0) + gap)

    def draft_seconds(self, requests: int) -> float:
        """Predicted seconds of a call of the proposer."""
        return float(self._draft.seconds(np.array([1.0, requests])))

    def per_attended(self) -> float:
        """Seconds per thousand tokens that a further row attends to."""
        return max(0.0, self._step.coefficient(-2)) * (self._step.scale or 1.0)

    def per_masked(self) -> float:
        """Seconds that a row under the tree mask costs more than another."""
        return max(0.0, self._step.coefficient(-1)) * (self._step.scale or 1.0)

    def _features(self, shape: StepShape) -> Floats:
        tokens = np.asarray(
            shape.requests + np.asarray(shape.nodes) + shape.prompt, dtype=np.float64
        )
        if len(self._graph_sizes):
            place = np.searchsorted(self._graph_sizes, tokens)
            padded = self._graph_sizes[np.minimum(place, len(self._graph_sizes) - 1)]
            tokens = np.maximum(tokens, padded)
        attended = np.broadcast_to(np.asarray(shape.attended, float), tokens.shape)
        masked = np.broadcast_to(np.asarray(shape.masked, float), tokens.shape)
        drafts = np.broadcast_to(np.asarray(shape.nodes) > 0, tokens.shape)
        one = np.ones_like(tokens)
        return np.stack(
            [one, tokens]
            + [np.maximum(tokens - knot, 0.0) for knot in _KNOTS]
            + [one * drafts, one * shape.requests, attended, masked],
            axis=-1,
        )

    def snapshot(self) -> dict[str, Any]:
        """Plain data: what a step costs here, and how sure that is."""
        if not self.ready:
            return {"steps": self._step.observed}
        one, more = (
            self.seconds(StepShape(requests=r, nodes=np.array([0, 1, 4, 16]),
                                   attended=0.0)) * 1e3
            for r in (1, 8)
        )  # fmt: skip
        return {
            "steps": self._step.observed,
            "relative_error": round(self._step.error, 4),
            "step_ms_1_request_0_1_4_16_nodes": [round(float(x), 3) for x in one],
            "step_ms_8_requests_0_1_4_16_nodes": [round(float(x), 3) for x in more],
            "draft_ms_1_request": round(self.draft_seconds(1) * 1e3, 4),
        }

    def state(self) -> dict[str, Any]:
        """Plain data for :meth:`restore`."""
        self.learn()
        return {
            "schema": _SCHEMA,
            "largest": self.largest,
            "step": self._step.state(),
            "draft": self._draft.state(),
            "gap": self._gap.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Starts from the state of an earlier model.

        Raises:
            ValueError: another version, or numbers that are none.
        """
        if state["schema"] != _SCHEMA:
            raise ValueError(f"schema {state['schema']}, expected {_SCHEMA}")
        parts = {"step": self._step, "draft": self._draft, "gap": self._gap}
        for name, part in parts.items():
            if state[name]["scale"] is not None:
                part.restore(state[name])
        self.largest = int(state["largest"])

    def save(self, path: Path) -> None:
        """Writes the state for the next start; complete or not at all.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        state = self.state()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(state, file)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> bool:
        """Starts from a saved state; whether there was a usable one.

        A file that is damaged or of another version is reported and left out.
        """
        try:
            self.restore(json.loads(path.read_text()))
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, np.linalg.LinAlgError) as bad:
            logger.warning("step times in %s are not usable (%s); measured anew",
                           path, bad)  # fmt: skip
            return False
        return True


@runtime_checkable
class UsesStepTimes(Protocol):
    """A policy that prices steps; ``specplugin replay`` starts it as a restarted engine."""

    def start_warm(self, times: StepTimeModel) -> None:
        """Takes step times in place of those it would have loaded from disk."""
        ...
