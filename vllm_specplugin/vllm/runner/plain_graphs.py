"""Full CUDA graphs for steps in which nothing is verified.

vLLM captures decoding as one graph for each number of requests, with as many tokens per
request as a step with drafts has (``v1/worker/gpu/cudagraph_utils.py:
CudaGraphManager._init_candidates``). A step of one token per request then finds none. With
a schedule of draft lengths vLLM captures graphs for each length in it, so while its graph
managers are made the schedule says what the plugin needs: no drafts, and, where drafts are
chains that vLLM's own attention serves, all of them too. Steps with trees find no full graph
and are run piecewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_specplugin.vllm.tree_attention.backend import full_graphs_offered

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["plain_graphs"]


@contextmanager
def plain_graphs(vllm_config: VllmConfig, chains: bool) -> Iterator[None]:
    """While vLLM's graph managers are made.

    Args:
        vllm_config: the engine's.
        chains: whether drafts are chains of vLLM's drafter.
    """
    speculative, compilation = vllm_config.speculative_config, vllm_config.compilation_config
    sizes = compilation.cudagraph_capture_sizes
    if speculative is None or not sizes or not full_graphs_offered(vllm_config):
        yield
        return
    schedule = speculative.num_speculative_tokens_per_batch_size
    most = vllm_config.num_speculative_tokens
    if chains:
        # vLLM looks for a graph among those of the next captured size only. Sizes between
        # multiples of a chain's length would hide its graphs.
        lengths, counts = [(1, 1, most), (2, 2, 0)], set[int]()
    else:
        lengths = [(1, 1, 0)]
        counts = _request_counts(min(vllm_config.scheduler_config.max_num_seqs, max(sizes)))
    speculative.num_speculative_tokens_per_batch_size = lengths
    compilation.cudagraph_capture_sizes = sorted({*sizes, *counts})
    try:
        yield
    finally:
        speculative.num_speculative_tokens_per_batch_size = schedule
        compilation.cudagraph_capture_sizes = sizes


def _request_counts(most: int) -> set[int]:
    """As vLLM spaces them without speculation.

    >>> sorted(_request_counts(20))
    [1, 2, 4, 8, 16, 20]
    """
    small = {count for count in (1, 2, 4) if count <= most}
    return small | set(range(8, most + 1, 8)) | {most}
