"""A vLLM 0.32 defect that spoils its own speculation on CPU, found and mended.

Without Triton, ``expand_batch_to_tokens`` of vLLM's rejection sampler writes its
result into a temporary copy when the values are floats, so temperature, top-k
and top-p of draft rows are uninitialised memory: at temperature above 0 the text
of vLLM's own methods is noise. This plugin never calls that function. Comparing
with vLLM's methods needs it mended, in the measuring process only, and said.
Remove when vLLM's CPU ``_expand`` writes float outputs.
"""

from __future__ import annotations

import torch

__all__ = ["expand_batch_to_tokens", "expansion_is_broken", "mend_expansion"]


def expansion_is_broken() -> bool:
    """Whether the installed vLLM loses the values it should repeat."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return False
    import vllm._custom_ops  # noqa: F401  (loads the kernels)
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    values = torch.tensor([0.5, 0.25])
    out = torch.zeros(3)
    _expand_kernel_impl(out, values, torch.tensor([2, 3], dtype=torch.int32), 0, 0)
    return out.tolist() != [0.5, 0.5, 0.25]


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """As vLLM's, for any type of values."""
    zero = cu_num_tokens.new_zeros(1)
    counts = torch.diff(cu_num_tokens, prepend=zero).long()
    if replace_from != replace_to:
        x = torch.where(x == replace_from, replace_to, x)
    return x.repeat_interleave(counts, output_size=num_tokens)


def mend_expansion() -> None:
    """Replaces the function in this process."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
