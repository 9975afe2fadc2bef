"""Mixed requests, and clients that send them, stream the answers and hang up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from vllm_specplugin.tools.held_out_prompts import held_out_prompts

__all__ = ["Answer", "Clients", "mixed_requests"]

_LONGEST = 160
_KINDS = (
    ("greedy", {"temperature": 0.0}),
    ("warm", {"temperature": 0.7}),
    ("plain", {"temperature": 1.0}),
    ("hot", {"temperature": 1.3, "top_p": 0.95}),
    ("top-k", {"temperature": 1.0, "top_k": 20}),
    ("penalties", {"temperature": 0.8, "presence_penalty": 0.5,
                   "repetition_penalty": 1.1}),
    ("stop", {"temperature": 0.7, "stop": ["\n\n", "return"]}),
    ("logprobs", {"temperature": 0.9, "logprobs": 2}),
    ("grammar", {"temperature": 1.0,
                 "structured_outputs": {"regex": "[a-z]{3,9}( [a-z]{2,8}){1,6}"}}),
    ("few nodes", {"temperature": 0.5, "vllm_xargs": {"spec_max_nodes": 3}}),
)  # fmt: skip


def mixed_requests(model: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Bodies for ``/v1/completions``, all different, every one with a seed of its
    own: what is answered does not depend on when it is asked."""
    draw = random.Random(seed)
    prompts = held_out_prompts(model, count, _LONGEST, seed=seed)
    made = []
    for number, prompt in enumerate(prompts):
        kind, parameters = _KINDS[number % len(_KINDS)]
        # Lengths about the edges of blocks as often as between them.
        length = draw.choice((8, 15, 16, 17, 31, 32, 33, 64, 65, 100, _LONGEST))
        shared = number % 7 == 0  # what they begin with
        made.append(
            {
                "prompt": (prompts[0] if shared else prompt)[:length],
                "max_tokens": draw.choice((1, 8, 16, 33, 64, 96)),
                "seed": number,
                "ignore_eos": kind != "stop",
                **parameters,
            }
        )
    return made


@dataclass(slots=True)
class Answer:
    """What a client got of one request."""

    number: int
    """Which of the requests."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    """vLLM's reason; ``None`` if the client hung up or was refused."""
    error: str = ""
    hung_up: bool = False
    begun: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When pieces came, ``time.monotonic()``."""
    used: int = 0
    """Completion tokens by the server's own account."""


class Clients:
    """Closed-loop clients of one server.

    Args:
        url: of the server.
        model: name it serves.
        requests: of :func:`mixed_requests`.
        aborts: share of requests whose client hangs up before the end.
        seed: decides who asks what, and who hangs up when.
    """

    def __init__(
        self,
        url: str,
        model: str,
        requests: list[dict[str, Any]],
        *,
        aborts: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._url, self._model, self._requests = url, model, requests
        self._aborts, self._draw = aborts, random.Random(seed)
        self.answers: list[Answer] = []
        self.live = 0

    async def each_once(self, clients: int) -> list[Answer]:
        """Every request once, answers in their order."""
        waiting = list(range(len(self._requests)))[::-1]

        async def work(session: aiohttp.ClientSession) -> None:
            while waiting:
                self.answers.append(await self._ask(session, waiting.pop(), None))

        await self._run(clients, work)
        return sorted(self.answers, key=lambda answer: answer.number)

    async def until(self, deadline: float, clients: int) -> None:
        """Requests without end, until ``time.monotonic()`` says so."""

        async def work(session: aiohttp.ClientSession) -> None:
            while time.monotonic() < deadline:
                number = self._draw.randrange(len(self._requests))
                leave = None
                if self._draw.random() < self._aborts:
                    leave = self._draw.choice((0, 1, 1, 2, 3, 5, 10))
                self.answers.append(await self._ask(session, number, leave))

        await self._run(clients, work)

    async def _run(self, clients: int, work: Any) -> None:
        limits = aiohttp.TCPConnector(limit=0)
        patience = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=limits, timeout=patience) as session:
            await asyncio.gather(*(work(session) for _ in range(clients)))

    async def _ask(self, session: aiohttp.ClientSession, number: int, leave: int | None) -> Answer:
        """Streams one answer; hangs up after ``leave`` pieces, 0 being about when
        the first comes or before."""
        body = {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": True,
            **self._requests[number],
        }
        answer = Answer(number, begun=time.monotonic())
        self.live += 1
        try:
            url = f"{self._url}/v1/completions"
            patience = self._draw.uniform(0.0, 0.2) if leave == 0 else None
            async with asyncio.timeout(patience), session.post(url, json=body) as response:
                async for piece in _pieces(response):
                    _add(answer, piece)
                    if leave and len(answer.arrivals) >= leave:
                        answer.hung_up = answer.finish is None
                        break
        except TimeoutError:
            answer.hung_up = leave == 0
            answer.error = "" if answer.hung_up else "no answer in time"
        except (aiohttp.ClientError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            self.live -= 1
        return answer


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    if response.status != 200:
        raise ValueError(f"status {response.status}: {(await response.text())[:300]}")
    async for line in response.content:
        data = line.strip().removeprefix(b"data: ")
        if data and data != b"[DONE]":
            piece: dict[str, Any] = json.loads(data)
            if "error" in piece:
                raise ValueError(str(piece["error"])[:300])
            yield piece


def _add(answer: Answer, piece: dict[str, Any]) -> None:
    if usage := piece.get("usage"):
        answer.used = usage["completion_tokens"]
    for choice in piece["choices"]:
        if choice.get("token_ids"):
            answer.arrivals.append(time.monotonic())
            answer.tokens += choice["token_ids"]
        answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
