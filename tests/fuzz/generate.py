"""Makes cases from a seed: the same seed, the same cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.fuzz.adversary import DEVICE_PATH, FAULTY, MODES, PATH
from tests.fuzz.adversary_device import DEVICE_MODES
from tests.fuzz.workload import Frame, Request, Workload

__all__ = ["PLUGIN", "make_frame", "make_workload"]

Rng = np.random.Generator

PLUGIN: Mapping[str, Any] = {"draft_timeout_ms": 1e7, "max_failures": 1_000_000}
"""Settings of every run: failures are counted and switch nothing off, unless a
workload wants them to."""
_BLOCK = 32
"""vLLM's on a CPU are multiples of this."""
_ALPHABET = 24
"""Most prompts are written in few tokens, so that text repeats."""
_REGEXES = (r"[a-z]{2} = \[[0-9]{4}\]", r"(ab|cd){1,6}e", r"[0-9]{1,12}", r"x*y")
_MOST_STOPS = 100
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
}
_REAL = ("suffix", "ngram", "token_recycling", "fused")
_POLICIES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("goodput", {}),
    ("fixed", {"nodes": 3}),
    ("confidence", {}),
    ("aimd", {}),
    ("bandit", {}),
)


def make_frame(seed: int, number: int, runner: str) -> Frame:
    """One engine.

    Args:
        seed: of the campaign.
        number: of the frame in it.
        runner: ``v1`` or ``v2``.
    """
    rng = np.random.default_rng([seed, number, 0])
    second = runner == "v2"
    longest = int(rng.choice([64, 96, 160] if second else [64, 96, 128, 192]))
    model = "target" if not second and rng.random() < 0.2 else "tiny"
    block = int(rng.choice([_BLOCK, _BLOCK, 2 * _BLOCK]))
    one = -(-longest // block)
    engine: dict[str, Any] = {
        "max_model_len": longest,
        "max_num_seqs": int(rng.choice([2, 4, 8])),
        "block_size": block,
        # the first block is never used
        "num_gpu_blocks_override": 1
        + int(one + rng.integers(0, 3) if rng.random() < 0.6 else 8 * one),
        "enable_prefix_caching": bool(rng.random() < 0.6),
    }
    if rng.random() < 0.6:
        least = max(engine["max_num_seqs"], 8)
        engine["max_num_batched_tokens"] = int(rng.choice([least, 24, 40, 64, 96]))
        engine["enable_chunked_prefill"] = True
    if rng.random() < 0.35:
        engine["scheduling_policy"] = "priority"
    if model == "tiny" and not second and rng.random() < 0.2:
        engine.update(enable_lora=True, max_loras=2, max_lora_rank=8)
    asynchronous = bool(second and rng.random() < 0.35)
    return Frame(
        runner=runner,
        model=model,
        engine=engine,
        max_nodes=int(rng.choice([4, 6, 8] if second else [2, 6, 12, 24, 64])),
        asynchronous=asynchronous,
        plain=bool(rng.random() < (0.5 if second else 0.25)),
    )


def make_workload(seed: int, frame_number: int, number: int, frame: Frame) -> Workload:
    """One workload for a frame.

    Args:
        seed: of the campaign.
        frame_number: of the frame.
        number: of the workload in it.
        frame: made by :func:`make_frame`.
    """
    rng = np.random.default_rng([seed, frame_number, 1 + number])
    second = frame.runner == "v2"
    count = int(rng.integers(2, 5 if second else 7))
    shared = _text(rng, 3 * _BLOCK)
    requests: list[Request] = []
    for i in range(count):
        requests.append(_request(rng, frame, i, shared, requests))
    drafting = _drafting(rng, frame)
    device = str(rng.choice(DEVICE_MODES)) if frame.asynchronous else "random"
    return Workload(
        requests=tuple(requests),
        drafting=drafting,
        device=device,
        seed=int(rng.integers(1 << 30)),
        name=f"seed {seed}, frame {frame_number}, workload {number}",
    )


def _drafting(rng: Rng, frame: Frame) -> dict[str, Any]:
    if frame.asynchronous:
        proposer = "token_recycling" if rng.random() < 0.25 else DEVICE_PATH
        return {"proposer": proposer, "policy": "fixed", "options": {}}
    nodes = int(rng.integers(1, frame.max_nodes + 1))
    drafting: dict[str, Any] = {
        "proposer": PATH,
        "policy": "fixed",
        "max_nodes": frame.max_nodes if rng.random() < 0.7 else nodes,
        "options": {"policy": {"nodes": frame.max_nodes}},
    }
    if rng.random() < 0.15:
        drafting["proposer"] = str(rng.choice(_REAL))
    if rng.random() < 0.2:
        name, options = _POLICIES[int(rng.integers(len(_POLICIES)))]
        drafting["policy"] = name
        drafting["options"] = {"policy": dict(options)}
    if rng.random() < 0.05:
        drafting["max_failures"] = 3
    return drafting


def _request(
    rng: Rng, frame: Frame, number: int, shared: list[int], before: list[Request]
) -> Request:
    follows = None
    tail: tuple[int, ...] = ()
    params = _params(rng, number, frame)
    if before and rng.random() < 0.15:
        follows = int(rng.integers(len(before)))
        tail = tuple(_text(rng, int(rng.integers(0, 5))))
    mode = str(rng.choice(MODES[1:] if rng.random() < 0.4 else _STRONG))
    if rng.random() < 0.9 and mode in FAULTY:
        mode = "branch"  # one bad draft has the proposer called for each alone
    return Request(
        prompt=tail if follows is not None else _prompt(rng, frame, shared, params),
        follows=follows,
        arrival=0 if rng.random() < 0.5 else int(rng.integers(0, 8)),
        abort=int(rng.integers(0, 8)) if rng.random() < 0.1 else None,
        priority=int(rng.integers(-2, 3)) if "scheduling_policy" in frame.engine else 0,
        # All have one: beside others vLLM 0.32 on a CPU gives a request without an
        # adapter that of the last slot (index -1 in its torch operators).
        lora=int(rng.integers(1, 3)) if "enable_lora" in frame.engine else 0,
        params=params,
        mode=mode,
    )


_STRONG = ("branch", "branch", "half", "twins", "maximum", "chain", "changing")


def _text(rng: Rng, length: int) -> list[int]:
    if rng.random() < 0.3:
        return [int(t) for t in rng.integers(2, 4096, length)]
    letters = rng.integers(2, 4096, _ALPHABET)
    return [int(t) for t in rng.choice(letters, length)]


def _prompt(rng: Rng, frame: Frame, shared: list[int], params: dict[str, Any]) -> tuple[int, ...]:
    """Lengths around the edges of blocks, of a root and its nodes, and of the
    context; often with a beginning in common."""
    longest, nodes = frame.max_model_len, frame.max_nodes
    edges = [1, 2, nodes, nodes + 1, nodes + 2]
    edges += [k * _BLOCK + d for k in (1, 2, 3) for d in (-1, 0, 1)]
    length = int(rng.choice(edges)) if rng.random() < 0.7 else int(rng.integers(1, 70))
    if rng.random() < 0.1:
        length = longest - int(rng.integers(1, nodes + 4))
        params["max_tokens"] = int(rng.integers(4, 40))
    length = max(1, min(length, longest - 1))
    own = _text(rng, length)
    if rng.random() < 0.5:
        common = min(length, int(rng.integers(1, len(shared) + 1)))
        own[:common] = shared[:common]
    return tuple(own)


def _params(rng: Rng, number: int, frame: Frame) -> dict[str, Any]:
    """Sampling parameters, each with some probability."""
    params: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.0], p=[0.4, 0.15, 0.3, 0.15])),
        "max_tokens": int(rng.integers(1, 20)),
        "seed": 1000 * (number + 1) + int(rng.integers(1000)),
        "ignore_eos": bool(rng.random() < 0.8),
    }

    def sometimes(chance: float, make: Callable[[], Mapping[str, Any]]) -> bool:
        hit = bool(rng.random() < chance)
        if hit:
            params.update(make())
        return hit

    sometimes(0.1, lambda: {"top_k": int(rng.integers(1, 30))})
    sometimes(0.1, lambda: {"top_p": float(rng.uniform(0.3, 0.95))})
    sometimes(0.06, lambda: {"repetition_penalty": 1.3})
    sometimes(0.06, lambda: {"frequency_penalty": float(rng.uniform(-1, 1.5))})
    sometimes(0.06, lambda: {"presence_penalty": 0.7})
    sometimes(0.2, lambda: {"logprobs": int(rng.integers(0, 6))})
    # Not beside adapters: vLLM 0.32 on a CPU then ends in its LoRA operators, which
    # take the rows to be sampled from for those of the prompt.
    if "enable_lora" not in frame.engine:
        sometimes(0.05, lambda: {"prompt_logprobs": int(rng.integers(0, 3))})
    if params["temperature"]:  # vLLM refuses several greedy ones
        sometimes(0.12, lambda: {"n": int(rng.integers(2, 4))})
    if not sometimes(0.1, lambda: {"structured_outputs": _structure(rng)}):
        _limits(rng, sometimes)
    sometimes(0.03, lambda: {"detokenize": False} if "stop" not in params else {})
    extra: dict[str, Any] = {}
    if rng.random() < 0.08:
        extra["spec_max_nodes"] = int(rng.integers(0, 6))
    if rng.random() < 0.04 and not frame.asynchronous:
        extra["spec_scorer"] = str(rng.choice(["rejection", "block", "traversal"]))
    if rng.random() < 0.01:
        extra["spec_max_nodes"] = 99  # refused
    if extra:
        params["extra_args"] = extra
    sometimes(0.01, lambda: {"min_p": 0.1})  # refused, by vLLM itself
    return params


def _structure(rng: Rng) -> dict[str, Any]:
    kind = int(rng.integers(4))
    if kind == 0:
        return {"json": _SCHEMA}
    if kind == 1:
        return {"choice": ["positive", "negative", "no"]}
    return {"regex": str(rng.choice(_REGEXES))}


def _limits(rng: Rng, sometimes: Callable[[float, Callable[[], Mapping[str, Any]]], bool]) -> None:
    """What ends a text, and what may not be in it."""
    words = np.array(["e", "a", "(", "th", "\n", " s", "1", "se", "=", "in"])
    sometimes(
        0.12,
        lambda: {
            "stop": [str(w) for w in rng.choice(words, int(rng.integers(1, 3)))],
            "include_stop_str_in_output": bool(rng.random() < 0.5),
        },
    )
    first = int(rng.integers(2, 3600))
    stops = list(range(first, first + int(rng.integers(20, 400))))
    if sometimes(0.1, lambda: {"stop_token_ids": stops}) and sometimes(
        0.4, lambda: {"min_tokens": int(rng.integers(1, 9))}
    ):
        # vLLM's second runner ends over more than 128 of them.
        sometimes(1.0, lambda: {"stop_token_ids": stops[:_MOST_STOPS]})
    if rng.random() < 0.06:
        some = [int(t) for t in rng.integers(2, 4096, int(rng.integers(3, 40)))]
        sometimes(1.0, lambda: {"allowed_token_ids": sorted(set(some))})
    else:
        sometimes(0.06, lambda: {"bad_words": ["self", " the", "return", "(", "e"]})
