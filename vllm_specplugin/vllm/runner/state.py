"""What the plugin keeps beside one of vLLM's runners."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_specplugin.api import ProposeContext, RequestView
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.errors import complain
from vllm_specplugin.scorers.exact import ExactScorer
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.step.scoring import RequestScorer
from vllm_specplugin.step.trace import TraceWriter
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.trees.step_layout import StepLayout
from vllm_specplugin.trees.tree import DraftTree
from vllm_specplugin.vllm.runner.engine_info import describe_engine
from vllm_specplugin.vllm.runner.reporter import Observer
from vllm_specplugin.vllm.runner.speculator import NativeDraftsV2
from vllm_specplugin.vllm.runner.target_rows import one_rank_only, target_rows
from vllm_specplugin.vllm.runner_v1.native_drafts import NativeCall
from vllm_specplugin.vllm.runner_v1.paged_model import PagedDraftModel

__all__ = ["SpecState", "Step"]

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """What one step carries from its preparation to its sampling."""

    layout: StepLayout
    plan: Any
    """A :class:`~.tree_attention.plan.TreeAttentionPlan` or, on vLLM's second runner, a
    :class:`~.tree_attention.device_plan.DeviceTreePlan`; ``None`` without branches."""
    num_tokens: int
    started: float


class SpecState:
    """The plugin's part of a runner; ``runner.spec``."""

    def __init__(self, config: SpecConfig, runner: Any) -> None:
        self.config = config
        self._runner = runner
        self.engine = describe_engine(runner, config)
        self.metrics = SpecMetrics()
        self.observer = Observer(config, runner, self.metrics)
        self.scorer = RequestScorer(config, self.engine)
        self.fallback_scorer = ExactScorer(None, self.engine)
        self.proposer = proposer = build(config, "proposer", self.engine)
        one_rank_only(proposer, runner.parallel_config.world_size)
        self.drafter = Drafter(
            proposer,
            build(config, "policy", self.engine),
            config,
            self.engine,
            self.metrics,
            context=self._context,
        )
        if config.trace and runner.parallel_config.rank == 0:
            self.drafter.trace = TraceWriter(
                Path(config.trace), config.trace_limit_mb, config.to_dict(), self.engine
            )
        self.trees: dict[str, DraftTree] = {}
        """Drafts handed to the scheduler after the last step."""
        self.seeds: dict[str, int] = {}
        self.admitted = 0
        self.step: Step | None = None
        self.laid_out = 0
        """Hash of the last step's trees, where there are several ranks."""
        self.draft_model: PagedDraftModel | None = None
        """Beside the runner from the time its caches exist, if it has one."""
        self.follows_native = proposer.needs.vllm_drafter
        self.couples_native = proposer.needs.coupled_drafter
        """Whether vLLM's drafter is to choose with the requests' noise."""
        self.native: NativeCall | NativeDraftsV2 | None = None
        """The call of vLLM's drafter that is due in this step."""
        self.emitted_from = np.zeros(0, dtype=np.int32)
        """``[requests]`` row of the step that each last token was emitted from."""
        self.hidden: torch.Tensor | None = None
        """``[rows, hidden_size]`` last hidden states of the step's rows."""
        self.place: Mapping[str, int] = {}
        """Index of each request in the two above."""
        self.drafts_wait = False
        """Whether drafts are due once the sampled tokens are booked."""
        self.idle_since = time.perf_counter()
        """End of the last drafting."""
        self.why_chains: str | None = "the KV cache is not allocated yet"

    def _context(self, *, requests: Sequence[RequestView], **prices: float) -> ProposeContext:
        views = requests
        model, session = self.draft_model, None
        req_ids = [view.req_id for view in views]
        if model is not None:
            index = self._runner.input_batch.req_id_to_index
            session = model.session(
                [index[view.req_id] for view in views], [len(view.tokens) for view in views]
            )
        native = None if self.native is None else self.native.of(req_ids)
        target = None
        if self.hidden is not None and self.drafter.needs_hidden:
            indices = [self.place[req_id] for req_id in req_ids]
            target = target_rows(self._runner, self.hidden, indices)
        return ProposeContext(
            requests=views, draft_model=session, native=native, target=target, **prices
        )

    def read_target(self) -> None:
        """Shows a draft model the target's hidden states of the step that ends."""
        model, call = self.draft_model, self.native
        if model is None or not isinstance(call, NativeCall):
            return
        if self.follows_native:
            model.forget_rows()
        else:
            model.read(call.hidden_states, call.aux_hidden_states)

    def close(self) -> None:
        """Ends the trace, if one is written, and the metrics."""
        self.observer.close()
        if self.drafter.trace is not None:
            self.drafter.trace.close()

    def draft(self, requests: list[DraftRequest]) -> list[DraftTree]:
        """One tree per request. Under tensor parallelism the first rank drafts
        for all: clocks differ between ranks, and so would their choices, while
        all of them have to lay out the same trees."""
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        if group.world_size == 1:
            drafted = self.drafter.draft(requests)
            if self.follows_native and self.native is not None:
                self.native.finish()
            return drafted
        told = None
        if group.is_first_rank:
            told = self.drafter.draft(requests), self.laid_out
        trees, expected = group.broadcast_object(told, src=0)
        if self.laid_out != expected:
            logger.critical(
                complain(
                    f"rank {group.rank_in_group} laid out draft trees with hash "
                    f"{self.laid_out:08x}, rank 0 with {expected:08x}",
                    "the same trees on every rank",
                    "restart, and report it with the log of all ranks; "
                    "--spec-proposer none or one rank avoids it",
                )
            )
            # vLLM hears exceptions of the first rank only; that another one has
            # ended makes it shut down.
            raise SystemExit(1)
        return trees  # type: ignore[no-any-return]

    def begin(self, step: Step) -> None:
        """A step is laid out. Its hash goes with the next drafts of the first rank to
        the others, so that comparing it takes no collective of its own."""
        from vllm.distributed.parallel_state import get_tp_group

        self.step = step
        if get_tp_group().world_size > 1:
            self.laid_out = step.layout.fingerprint()
