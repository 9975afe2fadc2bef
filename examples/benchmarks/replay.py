"""Tokens per step of proposers on texts of the target, without an engine.

    python -m examples.benchmarks.replay --batch 1 4 16 --try 'suffix' \
        --try 'token_recycling:{"k": 4}' --try 'fused'

The target answers held-out prompts once. Then every proposer drafts along these
answers as it would in an engine: batches of requests, a closed loop, and what
``exact`` would accept. It sees the target's rows on the text; those of rejected
nodes, which an engine would also show, are left out. Proposers that vLLM loads
something for cannot be replayed.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.benchmarks.policies import WORKLOADS, workload
from examples.demo.models import model_path
from examples.train_heads.target import Target, load_target
from vllm_specplugin import PROPOSERS
from vllm_specplugin.api import EngineInfo, ProposeContext, RequestView, TargetRows
from vllm_specplugin.config import parse_options
from vllm_specplugin.noise.gumbel import gumbel_rows

TOP = 16


@dataclass
class Answer:
    """A prompt and what the target made of it."""

    tokens: np.ndarray
    """``[length]`` int32, prompt and answer."""
    prompt: int
    top: np.ndarray
    """``[length, TOP]`` likeliest tokens after each."""
    hidden: torch.Tensor
    """``[length, hidden_size]``"""


@torch.inference_mode()
def answers(
    target: Target, prompts: list[list[int]], temperature: float, length: int
) -> list[Answer]:
    """Lets the target answer, under the noise that an engine would use."""
    seeds = np.arange(1, len(prompts) + 1, dtype=np.uint64)

    def noise(tokens: Any, scores: Any) -> Any:
        if not temperature:
            return scores
        places = np.full(len(tokens), tokens.shape[1])
        drawn = gumbel_rows(seeds, places, scores.shape[1], scores.device)
        return scores / temperature + drawn

    text = target.model.generate(
        torch.tensor(prompts), max_new_tokens=length, logits_processor=[noise],
        do_sample=False,
    )  # fmt: skip
    made = []
    for tokens in text:
        hidden = target.hidden(tokens[None])[0]
        top = target.lm_head(hidden).topk(TOP, -1).indices.int().numpy()
        made.append(Answer(tokens.int().numpy(), len(prompts[0]), top, hidden.float()))
    return made


class Replay:
    """One proposer along some answers."""

    def __init__(
        self, proposer: Any, target: Target, found: list[Answer], nodes: int, t: float
    ) -> None:
        self.proposer, self.target, self.nodes, self.temperature = (
            proposer, target, nodes, t
        )  # fmt: skip
        self.waiting = list(enumerate(found))[::-1]
        self.live: list[tuple[int, Answer, int]] = []
        self.tokens = self.steps = 0
        self.seconds = 0.0

    def run(self, batch: int) -> float:
        """Tokens per request and step."""
        while self.waiting or self.live:
            while self.waiting and len(self.live) < batch:
                number, answer = self.waiting.pop()
                # The prompt's last row emits the first token.
                self.live.append((number, answer, answer.prompt + 1))
                self._show(answer, 0, answer.prompt)
            self._step()
        return self.tokens / self.steps

    def _step(self) -> None:
        views = [self._view(number, answer, at) for number, answer, at in self.live]
        rows = torch.stack([answer.hidden[at - 2] for _, answer, at in self.live])
        target = TargetRows(hidden=rows, lm_head=self.target.lm_head)
        started = time.perf_counter()
        trees = self.proposer.propose(ProposeContext(requests=views, target=target))
        self.seconds += time.perf_counter() - started
        live, done = [], []
        for (number, answer, at), tree in zip(self.live, trees):
            end, node = at, -1
            children = list(zip(tree.parents.tolist(), tree.tokens.tolist()))
            while end < len(answer.tokens):
                wanted = (node, int(answer.tokens[end]))
                if wanted not in children:
                    break
                node, end = children.index(wanted), end + 1
            self._show(answer, at - 1, end)
            end = min(end + 1, len(answer.tokens))
            self.tokens += end - at
            self.steps += 1
            if end < len(answer.tokens):
                live.append((number, answer, end))
            else:
                done.append(str(number))
        self.proposer.release(done)
        self.live = live

    def _show(self, answer: Answer, start: int, end: int) -> None:
        if wanted := self.proposer.needs.top_tokens:
            emitted = np.append(answer.tokens[start + 1 :], -1)[: end - start]
            self.proposer.observe_rows(
                answer.tokens[start:end], answer.top[start:end, :wanted], emitted.astype(np.int32)
            )

    def _view(self, number: int, answer: Answer, at: int) -> RequestView:
        return RequestView(
            req_id=str(number), tokens=answer.tokens[:at],
            num_prompt_tokens=answer.prompt, max_nodes=self.nodes,
            max_depth=max(1, len(answer.tokens) - at), temperature=self.temperature,
            top_k=0, top_p=1.0, seed=1 + number, options={},
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--workloads", nargs="+", default=["code"], choices=WORKLOADS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=3, help="which prompts")
    parser.add_argument("--try", dest="tried", action="append", metavar="NAME[:JSON]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    home = model_path("target")
    target = load_target(str(home), "cpu")
    engine = EngineInfo(
        vocab_size=target.vocab_size, max_model_len=2048, max_num_seqs=64,
        max_nodes=args.nodes, hidden_size=target.hidden_size,
    )  # fmt: skip
    table: dict[str, dict[str, float]] = {}
    for name in args.workloads:
        for t in args.temperatures:
            work = workload(name, home, args.prompts, 128, temperature=t, seed=args.seed)
            shortest = min(map(len, work.prompts))
            prompts = [prompt[-shortest:] for prompt in work.prompts]
            found = answers(target, prompts, t, args.max_tokens)
            for batch in args.batch:
                cell = f"{name} T={t:g} batch {batch}"
                print(cell, flush=True)
                for tried in args.tried or ["suffix", "ngram", "token_recycling"]:
                    kind, _, options = tried.partition(":")
                    factory = PROPOSERS.get(kind)
                    values = json.loads(options or "{}")
                    config = parse_options(factory.Config, values, kind)
                    replay = Replay(factory(config, engine), target, found, args.nodes, t)
                    rate = replay.run(batch)
                    ms = replay.seconds / replay.steps * 1e3
                    print(f"    {rate:.3f}  {ms:6.3f} ms/request  {tried}", flush=True)
                    table.setdefault(cell, {})[tried] = rate
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
