"""Steps whose drafts stay on the device, with stand-ins for vLLM and the proposer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_specplugin import DeviceDrafts
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.step.failures import Failures
from vllm_specplugin.vllm.runner import async_step, device_budget
from vllm_specplugin.vllm.runner.async_step import DeviceSteps
from vllm_specplugin.vllm.runner.step_in_flight import DeviceStep
from vllm_specplugin.vllm.runner.tree_verifier import TreeVerifier

NODES, SLOTS, VOCAB = 4, 3, 50
SLOT = torch.tensor([2, 0])
TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TREE = torch.tensor([[-1, -1, 0, 2], [-1, 0, 1, 2]])
"""Branches in the first request, a chain in the second."""
SURVIVAL = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2]])


def drafts(
    tokens: torch.Tensor = TOKENS, parents: torch.Tensor = TREE, survival: torch.Tensor = SURVIVAL
) -> DeviceDrafts:
    return DeviceDrafts(tokens, parents, survival)


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
    one.keep(SLOT, drafts())
    assert kept(one, 2) == [5, 6, 7, 8]
    assert kept(one, 0) == [9, 10, 11, 12][:limit] + [-1] * (NODES - limit)
    assert kept(one, 1) == [-1] * NODES


def test_a_request_that_cannot_have_a_tree_keeps_a_chain() -> None:
    one = verifier([NODES] * 3, chains=(0, 2))
    one.keep(SLOT, drafts())
    assert kept(one, 2) == [5, -1, -1, 8]  # node 3 follows node 2, which is refused
    assert kept(one, 0) == [9, 10, 11, 12]


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    one = verifier([NODES] * 3)
    tokens = TOKENS.clone()
    tokens[0, 1], tokens[1, 3] = VOCAB, VOCAB - 1
    answer = one.keep(SLOT, drafts(tokens))
    assert kept(one, 2) == [5, -1, 7, 8]
    assert kept(one, 0) == [9, 10, 11, VOCAB - 1]
    assert answer.min() >= 0, "vLLM embeds them"


@pytest.mark.parametrize(
    "bad",
    [
        drafts(TOKENS[:, :3], TREE[:, :3], SURVIVAL[:, :3]),
        drafts(TOKENS[:1], TREE[:1], SURVIVAL[:1]),
        drafts(parents=TREE[:, :3]),
        drafts(survival=SURVIVAL[:1]),
        drafts(TOKENS.int()),
        drafts(parents=TREE.float()),
        drafts(survival=TOKENS),
    ],
)
def test_drafts_of_another_shape_or_type_are_refused(bad: DeviceDrafts) -> None:
    with pytest.raises(ValueError, match="drafts of"):
        verifier([NODES] * 3).keep(SLOT, bad)


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
    requests = {
        scope: SimpleNamespace(max_nodes=None, min_nodes=0, scope=scope) for scope in ("", "mine")
    }
    config = SpecConfig(proposer="token_recycling", policy="fixed", max_failures=2)
    metrics: Any = SimpleNamespace(failures=Counter())
    parts = SimpleNamespace(
        config=config,
        proposer=Proposer(),
        drafter=SimpleNamespace(failures=Failures(config, metrics)),
        metrics=metrics,
        scorer=SimpleNamespace(options=lambda req_id: requests[req_id]),
    )
    runner: Any = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=SLOTS,
        num_speculative_steps=NODES,
        vocab_size=VOCAB,
        spec=SimpleNamespace(parts=parts, chains_only=None),
        chain_only=lambda params: False,
        req_states=SimpleNamespace(
            req_id_to_index={"": 2, "mine": 0}, num_computed_tokens_np=np.array([30, 0, 20])
        ),
    )
    monkeypatch.setattr(
        async_step,
        "params_of",
        lambda new: SimpleNamespace(thinking_token_budget=None, extra_args=None),
    )
    made = DeviceSteps(runner)
    for scope, slot in runner.req_states.req_id_to_index.items():
        new: Any = SimpleNamespace(req_id=scope, prompt_embeds=None)
        made.admit(slot, new)
    return made


def draft(steps: Any, *answers: Any) -> torch.Tensor:
    steps._proposer.answers += answers
    batch: Any = SimpleNamespace(idx_mapping=SLOT, idx_mapping_np=SLOT.numpy())
    step = DeviceStep(plan=None, verifies=False)
    return steps.draft(step, batch, None, torch.zeros(0))


def scheduled(*req_ids: str, grammar: bool = False) -> SchedulerOutput:
    return replace(
        SchedulerOutput.make_empty(),
        num_scheduled_tokens={"prompt": 7} | dict.fromkeys(req_ids, 1 + NODES),
        total_num_scheduled_tokens=7 + len(req_ids) * (1 + NODES),
        scheduled_spec_decode_tokens={req_id: [-1] * NODES for req_id in req_ids},
        num_spec_tokens_to_schedule=NODES,
        has_structured_output_requests=grammar,
    )


def verified(steps: Any, *req_ids: str, grammar: bool = False) -> dict[str, int]:
    """Drafts of each request in the step as it is computed; all else must be as it was."""
    given = scheduled(*req_ids, grammar=grammar)
    made = steps.planned(given)
    found = {r: len(tokens) for r, tokens in made.scheduled_spec_decode_tokens.items()}
    expected = {"prompt": 7} | {r: 1 + found.get(r, 0) for r in req_ids}
    assert made.num_scheduled_tokens == expected
    assert made.total_num_scheduled_tokens == sum(expected.values())
    assert given == scheduled(*req_ids, grammar=grammar), "the scheduler's own object"
    return found


GOOD = drafts()
BAD = RuntimeError("as planted")


def failures(steps: Any) -> dict[str, int]:
    return dict(steps._spec.parts.metrics.failures)


def test_a_step_is_verified_if_any_of_its_requests_may_draft(steps: Any) -> None:
    draft(steps, GOOD)
    assert verified(steps, "", "mine") == {"": NODES, "mine": NODES}
    assert verified(steps, "mine") == {}, "what is learnt serves all: it drafts nothing"
    assert verified(steps, "mine", grammar=True) == {"mine": NODES}, "its mask's rows are fixed"


def test_nothing_is_verified_before_anything_was_drafted(steps: Any) -> None:
    assert verified(steps, "") == {}


def test_failures_in_a_row_switch_drafting_off_once(steps: Any) -> None:
    for answer in (BAD, GOOD, BAD, GOOD):
        draft(steps, answer)
    assert failures(steps) == {"proposer_error": 2}
    assert steps._failures.enabled
    draft(steps, BAD)
    draft(steps, BAD)
    assert failures(steps) == {"proposer_error": 4, "disabled": 1}
    assert not steps._failures.enabled
    draft(steps)  # the proposer is not asked any more
    assert steps._likeliest(torch.zeros(2, VOCAB)) is None, "nor shown anything"
    assert failures(steps) == {"proposer_error": 4, "disabled": 1}


@pytest.mark.parametrize("why", [BAD, drafts(TOKENS[:, :2])])
def test_a_failure_leaves_no_tree_of_an_earlier_step(steps: Any, why: Any) -> None:
    draft(steps, GOOD)
    assert kept(steps._trees, 2) == [5, 6, 7, 8]
    assert draft(steps, why).tolist() == [[0] * NODES] * 2
    assert kept(steps._trees, 2) == [-1] * NODES
    assert failures(steps) == {"proposer_error": 1}


def test_nor_does_switching_drafting_off(steps: Any) -> None:
    """A grammar in the batch has the step verified all the same."""
    draft(steps, GOOD)
    steps._failures.enabled = False
    assert draft(steps).tolist() == [[0] * NODES] * 2
    assert kept(steps._trees, 2) == [-1] * NODES


class Budgets:
    """Keeps what survives likelier than not; drafts until it is told not to."""

    wanted = True

    def budget(self, ctx: Any) -> Any:
        return [limit * self.wanted for limit in ctx.limits]

    def trim(self, ctx: Any) -> Any:
        return ctx.survival > 0.55

    def observe(self, outcome: Any) -> None:
        self.outcome = outcome


@pytest.fixture
def adaptive(steps: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same engine under a policy that decides step by step."""
    monkeypatch.setattr(device_budget, "is_first_rank", lambda: True)
    monkeypatch.setattr(device_budget, "of_first_rank", lambda choose: choose())
    parts = steps._spec.parts
    parts.config = replace(parts.config, policy="goodput")
    parts.drafter.policy = Budgets()
    steps.restart(same_proposer=True)
    steps._most[:] = NODES
    return steps


def test_a_step_verifies_what_the_policy_expects_to_survive(adaptive: Any) -> None:
    """It goes by the step before: what is drafted last has not reached the host."""
    flat = drafts(survival=torch.full((2, NODES), 0.1))
    verified(adaptive, "", "mine")
    for _ in range(20):
        draft(adaptive, GOOD)
        found = verified(adaptive, "", "mine")
    assert found == {"": NODES}
    draft(adaptive, flat)
    assert verified(adaptive, "", "mine") == {"": NODES}
    for _ in range(20):
        draft(adaptive, flat)
        found = verified(adaptive, "", "mine")
    assert found == {}
    assert verified(adaptive, "", grammar=True) == {"": NODES}, "its mask's rows are fixed"


def test_nothing_is_drafted_while_the_policy_wants_nothing(adaptive: Any) -> None:
    policy = adaptive._spec.parts.drafter.policy
    policy.wanted = False
    planned = adaptive.planned(scheduled(""))
    assert planned.num_spec_tokens_to_schedule == 0, "nor by a drafter of vLLM's"
    assert draft(adaptive).tolist() == [[0] * NODES] * 2
    policy.wanted = True
    planned = adaptive.planned(scheduled(""))
    assert planned.scheduled_spec_decode_tokens == {}
    assert planned.num_spec_tokens_to_schedule == NODES
    draft(adaptive, GOOD)
    assert adaptive._drafted


def test_the_policy_hears_what_became_of_a_step(adaptive: Any) -> None:
    adaptive.planned(scheduled(""))
    batch: Any = SimpleNamespace(
        idx_mapping_np=np.array([1, 2]),
        req_ids=["prompt", ""],
        num_computed_tokens_np=np.array([0, 20]),
        num_scheduled_tokens=np.array([7, 3]),
        is_prefilling_np=np.array([True, False]),
    )
    outcome = adaptive._budget.outcome_of(batch)
    assert adaptive._budget.outcome_of(batch) is None, "once for each step"
    outcome(np.array([1]), np.array([0, 2]), np.array([0, 2]))
    adaptive.planned(scheduled(""))
    told = adaptive._spec.parts.drafter.policy.outcome
    assert (told.req_ids, told.num_tokens) == ([""], [21])
    assert (told.drafted, told.accepted, told.prompt_tokens) == ([2], [1], 7)
