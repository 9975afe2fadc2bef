"""Which CUDA graphs vLLM's graph manager would capture and find, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_specplugin.vllm.runner.plain_graphs import plain_graphs

NODES = 4
SIZES = [5, 10, 20, 40, 80]
FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


def config(mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens_per_batch_size=[[1, 1, NODES]],
            uses_dynamic_speculative_decoding=lambda: True,
        ),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=list(SIZES),
            max_cudagraph_capture_size=max(SIZES),
            cudagraph_mode=mode,
        ),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        num_speculative_tokens=NODES,
        use_v2_model_runner=True,
    )


def manager(vllm_config: Any) -> Any:
    """vLLM's, as after capture."""
    made: Any = CudaGraphManager.__new__(CudaGraphManager)
    made.vllm_config = vllm_config
    made.compilation_config = vllm_config.compilation_config
    made.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    made.cudagraph_mode = vllm_config.compilation_config.cudagraph_mode
    made.decode_query_len = 1 + NODES
    made.varlen_decode, made.ubatch_runner = False, None
    made.lora_capture_cases, made._lora_dispatch_map = [0], {}
    made._candidates, made._capture_descs = {}, {}
    made._init_candidates()
    made._graphs_captured = True
    return made


def found(made: Any, requests: int, tokens_each: int) -> tuple[CUDAGraphMode, int]:
    tokens = requests * tokens_each
    answer = made.dispatch(requests, tokens, tokens_each, 0, max_query_len=tokens_each)
    return answer.cg_mode, answer.num_tokens


def test_vllm_has_none_for_steps_without_drafts() -> None:
    made = manager(config())
    assert found(made, 4, 1)[0] == PIECEWISE
    assert found(made, 4, 1 + NODES) == (FULL, 20)


@pytest.mark.parametrize(
    ("chains", "sizes"),
    [
        (False, {1: 1, 2: 2, 3: 4, 8: 8, 11: 16, 16: 16}),
        (True, {1: 5, 2: 5, 5: 5, 6: 10, 10: 10}),
    ],
)
def test_steps_without_drafts_find_one(chains: bool, sizes: dict[int, int]) -> None:
    given = config()
    with plain_graphs(given, chains):
        made = manager(given)
    for requests, padded in sizes.items():
        assert found(made, requests, 1) == (FULL, padded)


@pytest.mark.parametrize(("chains", "expected"), [(False, PIECEWISE), (True, FULL)])
def test_only_chains_of_vllms_are_replayed_whole(chains: bool, expected: CUDAGraphMode) -> None:
    """Attention over trees must not come from a graph."""
    given = config()
    with plain_graphs(given, chains):
        made = manager(given)
    for requests in (1, 3, 8, 16):
        assert found(made, requests, 1 + NODES)[0] == expected
    for tokens_each in (2, 3):
        assert found(made, 2, tokens_each)[0] == PIECEWISE


def test_afterwards_all_is_as_before() -> None:
    given = config()
    with plain_graphs(given, chains=False):
        pass
    assert given.speculative_config.num_speculative_tokens_per_batch_size == [[1, 1, NODES]]
    assert given.compilation_config.cudagraph_capture_sizes == SIZES


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
def test_without_graphs_for_decoding_nothing_is_changed(mode: CUDAGraphMode) -> None:
    given = config(mode)
    with plain_graphs(given, chains=False):
        assert given.compilation_config.cudagraph_capture_sizes == SIZES
