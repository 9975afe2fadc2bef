"""Steps whose drafts stay on the device, with stand-ins for vLLM and the proposer."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_specplugin.config import SpecConfig
from vllm_specplugin.vllm.runner import async_step
from vllm_specplugin.vllm.runner.async_step import DeviceSteps
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep
from vllm_specplugin.vllm.runner.tree_verifier import TreeVerifier

NODES, SLOTS, VOCAB = 4, 3, 50
SLOT = torch.tensor([2, 0])
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TREE = torch.tensor([[-1, -1, 0, 2], [-1, 0, 1, 2]])
"""Branches in the first request, a chain in the second."""


def verifier(limits: list[int], chains: tuple[int, ...] = ()) -> TreeVerifier:
    runner: Any = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=SLOTS,
        num_speculative_steps=NODES,
        vocab_size=VOCAB,
    )
    only = torch.tensor([slot in chains for slot in range(SLOTS)])
    return TreeVerifier(runner, torch.tensor(limits, dtype=torch.int32), only)


def kept(one: TreeVerifier, slot: int) -> list[int]:
    return one._tokens[slot].tolist()


@pytest.mark.parametrize("limit", range(NODES + 1))
def test_no_more_nodes_are_kept_than_a_request_may_have(limit: int) -> None:
    one = verifier([limit, 0, NODES])
    one.keep(SLOT, TOKENS, TREE)
    assert kept(one, 2) == [5, 6, 7, 8]
    assert kept(one, 0) == [9, 10, 11, 12][:limit] + [-1] * (NODES - limit)
    assert kept(one, 1) == [-1] * NODES


def test_a_request_that_cannot_have_a_tree_keeps_a_chain() -> None:
    one = verifier([NODES] * 3, chains=(0, 2))
    one.keep(SLOT, TOKENS, TREE)
    assert kept(one, 2) == [5, -1, -1, 8]  # node 3 follows node 2, which is refused
    assert kept(one, 0) == [9, 10, 11, 12]


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    one = verifier([NODES] * 3)
    tokens = TOKENS.clone()
    tokens[0, 1], tokens[1, 3] = VOCAB, VOCAB - 1
    answer = one.keep(SLOT, tokens, TREE)
    assert kept(one, 2) == [5, -1, 7, 8]
    assert kept(one, 0) == [9, 10, 11, VOCAB - 1]
    assert answer.min() >= 0, "vLLM embeds them"


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        (TOKENS[:, :3], TREE[:, :3]),
        (TOKENS[:1], TREE[:1]),
        (TOKENS, TREE[:, :3]),
        (TOKENS.int(), TREE),
        (TOKENS, TREE.float()),
    ],
)
def test_drafts_of_another_shape_or_type_are_refused(tokens: Any, parents: Any) -> None:
    with pytest.raises(ValueError, match="drafts of"):
        verifier([NODES] * 3).keep(SLOT, tokens, parents)


class Proposer:
    """Learns from rows, and offers to draft on the device."""

    top_tokens = 2

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def on_device(self, nodes: int, device: torch.device) -> Proposer:
        return self

    def propose(self, ctx: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of an engine that has drafted for two requests."""
    monkeypatch.setattr(DeviceSteps, "_context", lambda *_: None)
    requests = {scope: SimpleNamespace(max_nodes=None, scope=scope) for scope in ("", "mine")}
    parts = SimpleNamespace(
        config=SpecConfig(proposer="token_recycling", policy="fixed", max_failures=2),
        proposer=Proposer(),
        drafter=SimpleNamespace(enabled=True),
        metrics=SimpleNamespace(failures=Counter()),
        scorer=SimpleNamespace(options=lambda req_id: requests[req_id]),
    )
    runner: Any = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=SLOTS,
        num_speculative_steps=NODES,
        vocab_size=VOCAB,
        spec=SimpleNamespace(parts=parts, chains_only=None),
        chain_only=lambda params: False,
        req_states=SimpleNamespace(req_id_to_index={"": 2, "mine": 0}),
    )
    monkeypatch.setattr(
        async_step, "params_of", lambda new: SimpleNamespace(thinking_token_budget=None)
    )
    made = DeviceSteps(runner)
    for scope, slot in runner.req_states.req_id_to_index.items():
        new: Any = SimpleNamespace(req_id=scope, prompt_embeds=None)
        made.admit(slot, new)
    return made


def draft(steps: Any, *answers: Any) -> torch.Tensor:
    steps._proposer.answers += answers
    batch: Any = SimpleNamespace(idx_mapping=SLOT)
    step = DeviceStep(plan=None, verifies=False)
    return steps.draft(step, batch, None, torch.zeros(0))


def scheduled(*req_ids: str, grammar: bool = False) -> Any:
    return SimpleNamespace(
        has_structured_output_requests=grammar,
        scheduled_spec_decode_tokens={req_id: [-1] * NODES for req_id in req_ids},
    )


GOOD = (TOKENS, TREE)
BAD = RuntimeError("as planted")


def failures(steps: Any) -> dict[str, int]:
    return dict(steps._spec.parts.metrics.failures)


def test_a_step_is_verified_if_any_of_its_requests_may_draft(steps: Any) -> None:
    draft(steps, GOOD)
    assert steps.verifies(scheduled("", "mine"))
    assert not steps.verifies(scheduled("mine")), "what is learnt serves all: it drafts nothing"
    assert steps.verifies(scheduled("mine", grammar=True)), "rows of a grammar's mask are fixed"


def test_nothing_is_verified_before_anything_was_drafted(steps: Any) -> None:
    assert not steps.verifies(scheduled(""))


def test_failures_in_a_row_switch_drafting_off_once(steps: Any) -> None:
    for answer in (BAD, GOOD, BAD, GOOD):
        draft(steps, answer)
    assert failures(steps) == {"proposer_error": 2}
    assert steps._spec.parts.drafter.enabled
    draft(steps, BAD)
    draft(steps, BAD)
    assert failures(steps) == {"proposer_error": 4, "disabled": 1}
    assert not steps._spec.parts.drafter.enabled
    draft(steps)  # the proposer is not asked any more
    assert steps._likeliest(torch.zeros(2, VOCAB)) is None, "nor shown anything"
    assert failures(steps) == {"proposer_error": 4, "disabled": 1}


@pytest.mark.parametrize("why", [BAD, (TOKENS[:, :2], TREE[:, :2])])
def test_a_failure_leaves_no_tree_of_an_earlier_step(steps: Any, why: Any) -> None:
    draft(steps, GOOD)
    assert kept(steps._trees, 2) == [5, 6, 7, 8]
    assert draft(steps, why).tolist() == [[0] * NODES] * 2
    assert kept(steps._trees, 2) == [-1] * NODES
    assert failures(steps) == {"proposer_error": 1}


def test_nor_does_switching_drafting_off(steps: Any) -> None:
    """A grammar in the batch has the step verified all the same."""
    draft(steps, GOOD)
    steps._spec.parts.drafter.enabled = False
    assert draft(steps).tolist() == [[0] * NODES] * 2
    assert kept(steps._trees, 2) == [-1] * NODES
