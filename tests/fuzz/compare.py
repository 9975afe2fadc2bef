"""Judges a drafted run by the one without drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.fuzz.adversary import FAULTY
from tests.fuzz.workload import Case, Request

__all__ = ["compare", "compare_texts", "engine_problems"]

_CLOSE = 2e-3
"""Nats by which log-probabilities may differ: rows are computed in other shapes."""
_RANKS = 2
"""Places by which ranks may differ, for tokens so close to each other."""


def compare(case: Case, truth: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """What is wrong with a drafted run, as sentences; empty if nothing is."""
    work = case.workload
    problems = compare_texts(work.requests, truth["outputs"], got["outputs"])
    return [*problems, *engine_problems(case, truth), *engine_problems(case, got)]


def compare_texts(
    requests: Sequence[Request],
    truth: Sequence[Mapping[str, Any]],
    got: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The same for what the requests got."""
    problems: list[str] = []
    for number, (want, found) in enumerate(zip(truth, got)):
        place = f"request {number}"
        if want["refused"] != found["refused"]:
            problems.append(
                f"{place}: refused {found['refused']}, without drafts {want['refused']}"
            )
        elif want["refused"] is None and _comparable(requests, got, number):
            problems += [f"{place}: {text}" for text in _differences(want, found)]
    return problems


def _comparable(requests: Sequence[Request], got: Sequence[Mapping[str, Any]], number: int) -> bool:
    """Whether a request's prompt and text must be what they are without drafts: not
    if it, or what it follows, is scored by another rule, or that was aborted."""
    request = requests[number]
    if not request.exact:
        return False
    follows = request.follows
    return follows is None or (not got[follows]["aborted"] and _comparable(requests, got, follows))


def _differences(want: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    problems = []
    for index, (true, tokens) in enumerate(zip(want["tokens"], found["tokens"])):
        part = true[: len(tokens)] if found["aborted"] else true
        if tokens != part:
            at = next(
                (i for i, (a, b) in enumerate(zip(true, tokens)) if a != b),
                min(len(true), len(tokens)),
            )
            problems.append(
                f"completion {index} differs from token {at} on: {tokens[at:][:6]}, "
                f"without drafts {true[at:][:6]}"
            )
            continue
        if found["aborted"] and not tokens:
            continue
        problems += _logprob_differences(
            want["logprobs"][index], found["logprobs"][index], f"logprobs of completion {index}"
        )
        if found["aborted"]:
            continue
        for key in ("finish", "stop", "texts"):
            if want[key][index] != found[key][index]:
                problems.append(
                    f"{key} of completion {index} is {found[key][index]!r}, "
                    f"without drafts {want[key][index]!r}"
                )
    if not found["aborted"]:
        problems += _logprob_differences(
            want["prompt_logprobs"], found["prompt_logprobs"], "prompt_logprobs"
        )
    return problems


def _logprob_differences(want: Any, found: Any, where: str) -> list[str]:
    if want is None or found is None:
        return [] if want is found else [f"{where}: one of the runs has none"]
    for place, (true, step) in enumerate(zip(want, found)):
        if true is None or step is None:
            if true is not step:
                return [f"{where} at {place}: one of the runs has none"]
            continue
        if problem := _step_difference(true, step):
            return [f"{where} at {place}: {problem}"]
    return []


def _step_difference(true: list[Any], step: list[Any]) -> str | None:
    if len(true) != len(step):
        return f"{len(step)} entries, without drafts {len(true)}"
    ours = {token: (logprob, rank) for token, logprob, rank in step}
    least = min(logprob for _, logprob, _ in true)
    for token, logprob, rank in true:
        if token not in ours:
            if logprob > least + _CLOSE:
                return f"token {token} is missing"
            continue
        other, other_rank = ours[token]
        if logprob != other and not abs(logprob - other) <= _CLOSE:
            return f"token {token} has {other:.5f}, without drafts {logprob:.5f}"
        if abs((rank or 0) - (other_rank or 0)) > _RANKS:
            return f"token {token} has rank {other_rank}, without drafts {rank}"
    return None


def engine_problems(case: Case, got: Mapping[str, Any]) -> list[str]:
    """What does not add up in the engine, whatever was emitted."""
    problems = list(got["leaks"])
    if (stats := got["stats"]) is None:
        return problems
    requests = case.workload.requests
    allowed = {"disabled"}
    modes = {request.mode for request in requests}
    if case.frame.asynchronous:
        modes = {case.workload.device}
    if modes & set(FAULTY):
        allowed |= {"proposer_error", "malformed_tree"}
    for kind, count in stats["failures"].items():
        if kind not in allowed:
            problems.append(f"{count} failures of kind {kind!r}")
    if stats["accepted"] > stats["nodes"]:
        problems.append(f"{stats['accepted']} of {stats['nodes']} nodes accepted")
    if stats["emitted"] != stats["requests"] + stats["accepted"]:
        problems.append(
            f"{stats['emitted']} emitted, but {stats['requests']} rows and "
            f"{stats['accepted']} accepted"
        )
    given = sum(len(text) for one in got["outputs"] for text in one["tokens"])
    ends = sum(len(one["tokens"]) for one in got["outputs"])
    # A stop inside an accepted path, or an abort, drops what one step emitted; the
    # request that ends the run has one token.
    most = given + 1 + 2 * ends * (1 + case.frame.max_nodes)
    if not given <= stats["emitted"] <= most:
        problems.append(f"{stats['emitted']} emitted, but {given} tokens given")
    depths = stats["accepted_by_depth"]
    if depths and sum(depths) != stats["accepted"]:
        problems.append(f"accepted by depth {depths}, in all {stats['accepted']}")
    return problems
