"""Runs many workloads, shrinks what fails, and says what was covered."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.coverage import Coverage
from tests.fuzz.generate import make_frame, make_workload
from tests.fuzz.session import Session, Start, start_engine
from tests.fuzz.shrink import shrink
from tests.fuzz.workload import Case, Frame, Workload

__all__ = ["Failure", "Plan", "campaign", "replay_case"]

_PER_FRAME = {"v1": 100, "v2": 25}
_SECOND_EVERY = 3
"""With both runners each third engine is on the second one, for a tenth of the
workloads: without a GPU it is slow."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign is to do."""

    seed: int = 0
    workloads: int = 200
    runner: str = "both"
    """``v1``, ``v2`` or ``both``."""
    minutes: float | None = None
    """No workload is begun after so long."""
    shrink_seconds: float = 90.0
    most_failures: int = 10
    """The campaign ends early after so many."""
    per_frame: int | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that failed, as found and as small as it could be made."""

    case: Case
    problems: list[str]
    small: Case
    small_problems: list[str]

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.case.workload.name,
            "problems": self.problems,
            "case": json.loads(self.case.to_json()),
            "shrunk": json.loads(self.small.to_json()),
            "shrunk_problems": self.small_problems,
        }


def frames(plan: Plan) -> Iterator[tuple[int, Frame, int]]:
    """``(number, frame, workloads in it)``, without end."""
    number = 0
    while True:
        runner = plan.runner
        if runner == "both":
            last = number % _SECOND_EVERY == _SECOND_EVERY - 1
            runner = "v2" if last else "v1"
        yield (number, make_frame(plan.seed, number, runner), plan.per_frame or _PER_FRAME[runner])
        number += 1


def campaign(
    plan: Plan, *, start: Start = start_engine, bar: Any = None
) -> tuple[Coverage, list[Failure]]:
    """Runs a plan.

    Args:
        plan: what to do.
        start: makes engines.
        bar: a ``tqdm`` to move on.
    """
    coverage = Coverage()
    failures: list[Failure] = []
    begun, left = time.monotonic(), plan.workloads

    def over() -> bool:
        late = plan.minutes is not None and (time.monotonic() - begun > 60 * plan.minutes)
        return left <= 0 or late or len(failures) >= plan.most_failures

    for number, frame, count in frames(plan):
        if over():
            break
        coverage.frame(frame)
        with Session(frame, start) as session:
            for i in range(min(count, left)):
                if over():
                    break
                workload = make_workload(plan.seed, number, i, frame)
                verdict = session.judge(workload)
                coverage.workload(frame, workload, verdict)
                left -= 1
                if verdict.failed:
                    print(f"{workload.name}: {verdict.problems[0]}", file=sys.stderr)
                    failures.append(_shrunk(session, workload, verdict.problems, plan))
                if bar is not None:
                    bar.update()
                    bar.set_postfix_str(f"{frame.runner}, {len(failures)} failed")
    return coverage, failures


def _shrunk(session: Session, workload: Workload, problems: list[str], plan: Plan) -> Failure:
    def fails(candidate: Workload) -> bool:
        return session.judge(candidate).failed

    small = shrink(workload, fails, seconds=plan.shrink_seconds)
    last = session.judge(small).problems
    return Failure(
        case=Case(frame=session.frame, workload=workload),
        problems=problems,
        small=Case(frame=session.frame, workload=small),
        small_problems=last or ["(does not fail each time)"],
    )


def replay_case(case: Case, *, start: Start = start_engine) -> tuple[Coverage, list[str]]:
    """Runs one case from a file."""
    coverage = Coverage()
    with Session(case.frame, start) as session:
        coverage.frame(case.frame)
        verdict = session.judge(case.workload)
        coverage.workload(case.frame, case.workload, verdict)
    return coverage, verdict.problems


def write_reproducer(failure: Failure, folder: Path) -> Path:
    """Writes the small case to a file named by what it holds."""
    text = failure.small.to_json() + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = folder / f"fuzz-{digest}.json"
    path.write_text(text, "utf-8")
    return path
