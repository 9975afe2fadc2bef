"""A double of FlashInfer's wrapper, with its signatures (0.7.0.post1).

What it computes comes from its arguments alone: pages, layout, lengths and the mask.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["BatchPrefillWithPagedKVCacheWrapper"]


class BatchPrefillWithPagedKVCacheWrapper:
    plans = 0
    """Calls of :meth:`plan`, of all wrappers."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout in {"NHD", "HND"}
        assert backend in {"auto", "fa2"}  # the others take no mask
        self._layout = kv_layout

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        **others: Any,
    ) -> None:
        assert not others
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(one.dtype == torch.int32 for one in indices)
        rows, pages = qo_indptr.diff(), paged_kv_indptr.diff()
        assert (rows > 0).all()
        assert (pages > 0).all()
        assert (paged_kv_last_page_len > 0).all()
        assert (paged_kv_last_page_len <= page_size).all()
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices)
        lengths = (pages - 1) * page_size + paged_kv_last_page_len
        assert custom_mask is not None
        assert custom_mask.dtype == torch.bool
        assert custom_mask.shape == (int((rows * lengths).sum()),)
        assert sm_scale is not None
        self._rows, self._pages, self._lengths = rows, pages, lengths
        self._indices, self._mask = paged_kv_indices, custom_mask.clone()
        self._shape = (page_size, num_kv_heads, head_dim_qk)
        self._heads, self._scale = num_qo_heads, sm_scale
        self._dtypes = q_data_type, kv_data_type
        BatchPrefillWithPagedKVCacheWrapper.plans += 1

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        **others: Any,
    ) -> torch.Tensor:
        assert not args
        assert not others
        assert (q.dtype, paged_kv_cache[0].dtype) == self._dtypes
        assert q.shape == (int(self._rows.sum()), self._heads, self._shape[2])
        made = torch.empty_like(q) if out is None else out
        assert made.shape == q.shape
        assert made.dtype == q.dtype
        row = page = bit = 0
        for rows, pages, length in zip(
            self._rows.tolist(), self._pages.tolist(), self._lengths.tolist()
        ):
            read = self._indices[page : page + pages].long()
            keys, values = (self._gather(one[read], length) for one in paged_kv_cache)
            mask = self._mask[bit : bit + rows * length].view(rows, length)
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[row : row + rows].float().transpose(0, 1),
                keys,
                values,
                attn_mask=mask,
                scale=self._scale,
            )
            made[row : row + rows] = attended.transpose(0, 1).to(made.dtype)
            row, page, bit = row + rows, page + pages, bit + rows * length
        return made

    def _gather(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """``[heads, length, head_size]`` float32."""
        if self._layout == "HND":
            blocks = blocks.transpose(1, 2)
        assert blocks.shape[1:] == self._shape
        flat = blocks.flatten(0, 1)[:length].float().transpose(0, 1)
        return flat.repeat_interleave(self._heads // self._shape[1], 0)
