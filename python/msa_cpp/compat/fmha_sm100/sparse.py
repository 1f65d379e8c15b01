"""Attention over lists of blocks: prefill behind build_k2q_csr, and paged decode.

Shapes: q [T,Hq,D]; k, v packed [S,Hkv,D] or pages [P,Hkv,128,D]; lists q2k int32 [Hkv,T,K] in any
order, -1 behind.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import msa_cpp
import torch

from .._calls import uniform_cu_seqlens
from .api import _fmha_sm100, _fmha_sm100_plan

__all__ = [
    "SparseDecodePagedAttentionWrapper", "build_k2q_csr", "fp4_indexer_block_scores",
    "sparse_atten_func", "sparse_atten_nvfp4_kv_func", "sparse_decode_atten_func", "sparse_fmha",
    "sparse_fmha_plan",
]

sparse_fmha_plan = _fmha_sm100_plan


def sparse_fmha(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan_info: dict[str, Any],
    out: torch.Tensor | None = None, max_score: torch.Tensor | None = None, **options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`_fmha_sm100`, with its arguments in another order."""
    return _fmha_sm100(q, k, v, plan_info, out=out, max_score=max_score, **options)


def build_k2q_csr(
    q2k_indices: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    kv_block_size: int, *, total_k: int | None = None, max_seqlen_k: int | None = None,
    max_seqlen_q: int | None = None, total_rows: int | None = None, qhead_per_kv: int = 1,
    return_schedule: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, None]:
    """What `sparse_atten_func` needs of the lists q2k: an opaque pair, and None as its schedule.

    Kernels here read the lists themselves, so the pair carries them and nothing is built. The
    inverse of the lists is `msa_cpp.block_lists`.
    """
    if q2k_indices.dim() != 3 or q2k_indices.dtype != torch.int32:
        raise ValueError(f"q2k_indices: got rank {q2k_indices.dim()} of {q2k_indices.dtype}, "
                         "expected int32 [Hkv,T,K]")
    pair = q2k_indices.new_empty((q2k_indices.shape[0], 0)), q2k_indices
    return (*pair, None) if return_schedule else pair


def sparse_atten_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k2q_row_ptr: torch.Tensor,
    k2q_q_indices: torch.Tensor, topK: int, *, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, blk_kv: int = 128,
    causal: bool = False, softmax_scale: float | None = None, lse_temperature_scale: float = 1.0,
    return_temperature_lse: bool = False, partial_dtype: torch.dtype | None = None,
    return_softmax_lse: bool = False, page_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None, schedule: Any = None, usable_SM_count: int = -1,
    qk_dtype: torch.dtype | None = None, pv_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None, output_scale: torch.Tensor | float | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Attention over the lists that `build_k2q_csr` was given: [T,Hq,D], and the LSE on request.

    Args:
        page_table: int32 [B,pages], of paged k and v.
        seqused_k: int32 [B], the keys in use, of pages or of a larger packed buffer; without it
            lengths follow from `cu_seqlens_k`.
        return_softmax_lse: also the natural log of the sum of exp(logits), float32 [T,Hq].
        return_temperature_lse: and, as a third result, that of the logits divided by
            `lse_temperature_scale`. Other than 1 it takes a second pass over the blocks.

    partial_dtype, schedule and usable_SM_count are hints that nothing here needs. Errors:
    NotImplementedError for 8-bit elements and output scales, ValueError for a temperature that is
    no positive number.
    """
    if output_scale is not None:
        raise NotImplementedError("output_scale: given, supported is None: scales belong to "
                                  "quantised elements")
    if not 0 < lse_temperature_scale < math.inf:
        raise ValueError(f"lse_temperature_scale: got {lse_temperature_scale}, expected a positive "
                         "finite number")
    if return_temperature_lse and not return_softmax_lse:
        raise ValueError("return_temperature_lse: got True, expected return_softmax_lse=True too")
    for name, dtype in (("qk_dtype", qk_dtype), ("pv_dtype", pv_dtype)):
        if dtype not in (None, q.dtype):
            raise NotImplementedError(f"{name}: got {dtype}, supported is that of q, {q.dtype}")
    ids = k2q_q_indices
    if k2q_row_ptr.shape[-1] != 0 or ids.shape != (k.shape[1], q.shape[0], topK):
        raise ValueError(f"k2q_q_indices: got shape {tuple(ids.shape)}, expected what this "
                         f"package's build_k2q_csr makes of [Hkv,T,K] = "
                         f"{[k.shape[1], q.shape[0], topK]}")
    keys: dict[str, Any]
    if page_table is not None:
        used = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        keys = dict(seq_lens=used, page_table=page_table)
    elif seqused_k is None:
        keys = dict(cu_seqlens_k=cu_seqlens_k)
    elif seqused_k.shape[0] == 1:
        keys = dict(cu_seqlens_k=torch.nn.functional.pad(seqused_k, (1, 0)))
    elif causal:  # the last query sees the last key in use
        keys = dict(cu_seqlens_k=cu_seqlens_k, q_offset=seqused_k - cu_seqlens_q.diff())
    else:
        raise NotImplementedError("seqused_k: given for several packed requests, supported with "
                                  "page_table, causal=True or for one request")
    batch = msa_cpp.Batch(cu_seqlens_q, **keys, causal=causal, block_size=blk_kv,
                          max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    out, lse = msa_cpp.sparse_attention(q, k, v, ids, batch=batch, softmax_scale=softmax_scale,
                                        out=out, return_lse=True)
    if not return_softmax_lse:
        return out
    if not return_temperature_lse:
        return out, lse
    if lse_temperature_scale == 1:
        return out, lse, lse
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _, tempered = msa_cpp.sparse_attention(  # values take no part in it: the keys are at hand
        q, k, k, ids, batch=batch, softmax_scale=scale / lse_temperature_scale, return_lse=True)
    return out, lse, tempered


def sparse_decode_atten_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q2k_indices: torch.Tensor | None = None, *,
    page_table: torch.Tensor, seqused_k: torch.Tensor, seqlen_q: int, max_seqlen_k: int,
    blk_kv: int = 128, causal: bool = True, softmax_scale: float | None = None,
    return_softmax_lse: bool = False, schedule: Any = None, O_partial: torch.Tensor | None = None,
    LSE_partial: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One decode step: `SparseDecodePagedAttentionWrapper` planned and run."""
    wrapper = SparseDecodePagedAttentionWrapper(blk_kv=blk_kv, causal=causal)
    wrapper.plan(page_table=page_table, seqused_k=seqused_k, seqlen_q=seqlen_q,
                 max_seqlen_k=max_seqlen_k, q2k_indices=q2k_indices)
    return wrapper.run(q, k, v, softmax_scale=softmax_scale,
                       return_softmax_lse=return_softmax_lse)


class SparseDecodePagedAttentionWrapper:
    """`seqlen_q` new tokens of every request over paged keys, planned once and run per layer.

    The tensors of the plan are read when it runs, so callers may write new lengths, pages and ids
    into them.
    """

    def __init__(self, *, blk_kv: int = 128, causal: bool = True) -> None:
        self.blk_kv, self.causal = blk_kv, causal
        self._batch: msa_cpp.Batch | None = None

    def plan(
        self, *, page_table: torch.Tensor, seqused_k: torch.Tensor, seqlen_q: int,
        max_seqlen_k: int, q2k_indices: torch.Tensor | None = None,
        num_qo_heads: int | None = None, num_kv_heads: int | None = None,
        head_dim: int | None = 128, enable_cuda_graph: bool = False,
        max_grid_size: int | None = None, fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> SparseDecodePagedAttentionWrapper:
        """page_table int32 [B,pages], seqused_k int32 [B]; q2k_indices [Hkv,B*seqlen_q,K], or None
        for dense attention. The options are hints that nothing here needs."""
        batch = seqused_k.shape[0]
        self.q2k_indices, self._tokens = q2k_indices, batch * seqlen_q
        self._batch = msa_cpp.Batch(
            uniform_cu_seqlens(batch, seqlen_q, seqused_k.device), seq_lens=seqused_k,
            page_table=page_table, max_seqlen_q=seqlen_q, max_seqlen_k=max_seqlen_k,
            block_size=self.blk_kv, causal=self.causal)
        return self

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
        softmax_scale: float | None = None, return_softmax_lse: bool = False,
        out: torch.Tensor | None = None, lse: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[B*seqlen_q,Hq,D], and the LSE float32 [B*seqlen_q,Hq] on request."""
        if self._batch is None:
            raise RuntimeError("run: not planned, expected plan() first")
        if q.shape[0] != self._tokens:
            raise ValueError(f"q: got {q.shape[0]} tokens, the plan was made for {self._tokens}")
        options: dict[str, Any] = dict(softmax_scale=softmax_scale, out=out, lse=lse,
                                       return_lse=return_softmax_lse, batch=self._batch)
        if self.q2k_indices is None:
            return msa_cpp.dense_attention(q, k, v, **options)
        return msa_cpp.sparse_attention(q, k, v, self.q2k_indices, **options)


def sparse_atten_nvfp4_kv_func(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("sparse_atten_nvfp4_kv_func: 4-bit caches are not in this version")


def fp4_indexer_block_scores(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("fp4_indexer_block_scores: 4-bit index keys are not in this version")
