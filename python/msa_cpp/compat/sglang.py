"""MiniMax-M3's sparse attention in SGLang, over msa_cpp.

    MSA_SGLANG=1 python -m sglang.launch_server --page-size 128 ...    # the plugin calls patch()
    msa_cpp.compat.sglang.patch()                                      # or by hand

The functions below stand for those of sglang/kernels/ops/attention/minimax_sparse (read in SGLang
0.5.23 and main of November 2026), with the same arguments and results.

**Caches** are slot-major, [slots,Hkv,D] and [slots,1,Di], and `req_to_token` [requests,length] says
in which slot each token of a request lies. With pages of 128 tokens or a multiple, the slots of a
block follow each other, so a block is found by the slot of its first token: the cache is read as
pages [slots-127,Hkv,128,D] that start at every slot and overlap, whose table is every 128th column
of `req_to_token`, of which a sequence has the row `slot_ids` names. Nothing is gathered. With
smaller pages a block is scattered, and the call is handed back.

What differs: of equal scores the lower block wins. What is handed back to SGLang's own functions,
with one line in the log: pages smaller than a block, sinks, index values, scores other than "max",
several queries per selection, `loc_mapping` and `hisparse_slots`, dense main attention, 8-bit
caches, scales other than 1 in attention, and what no backend here computes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import msa_cpp
import torch

from ._calls import NO_BOUND, int32, low_words, uniform_cu_seqlens
from ._engine import Engine


def flash_prefill_with_topk_index(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None,
    sink: torch.Tensor | None, req_to_token: torch.Tensor, slot_ids: torch.Tensor,
    cu_seqlens: torch.Tensor, seq_lens: torch.Tensor, prefix_lens: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, block_size_q: int, block_size_k: int, topk: int,
    init_blocks: int = 1, local_blocks: int = 2, sm_scale: float | None = None,
    use_tma: bool = False, score_type: str = "max", disable_index_value: bool = False,
    cu_seqblocks_q: torch.Tensor | None = None, max_seqblock_q: int | None = None,
    all_seqblock_q: int | None = None, page_size: int = 1, q_scale: float | None = None,
    k_scale: float | None = None, v_scale: float | None = None,
    loc_mapping: torch.Tensor | None = None,
) -> tuple[None, torch.Tensor]:
    """The blocks of a prefill chunk: (None, int32 [Hi,T,K]), ids ascending, -1 behind.

    q [T,Hi,Di]; k_cache [slots,1,Di]; slot_ids [B]: the rows of `req_to_token`. Scales are positive
    and do not change which blocks score best.
    """
    _refuse(sink=sink, loc_mapping=loc_mapping)
    _refuse_other("block_size_q", block_size_q, 1)
    _refuse_index_options(score_type, disable_index_value)
    pages = _Pages(req_to_token, slot_ids, block_size_k, page_size, max_seqlen_k)
    return None, msa_cpp.index_select(
        q, pages.index_keys(k_cache), cu_seqlens_q=int32(cu_seqlens), seq_lens=int32(seq_lens),
        **pages.table, q_offset=int32(prefix_lens), topk=topk, block_size=block_size_k,
        init_blocks=init_blocks, local_blocks=local_blocks, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k)


def flash_decode_with_topk_idx(
    q: torch.Tensor, sink: torch.Tensor | None, k_cache: torch.Tensor,
    v_cache: torch.Tensor | None, req_to_token: torch.Tensor, seq_lens: torch.Tensor,
    max_seqlen: int, slot_ids: torch.Tensor, block_size: int, topk: int, init_blocks: int,
    local_blocks: int, sm_scale: float | None = None, use_tma: bool = True,
    score_type: str = "max", disable_index_value: bool = False, use_dense_main_attn: bool = False,
    page_size: int = 1, q_scale: float | None = None, k_scale: float | None = None,
    v_scale: float | None = None, topk_out: torch.Tensor | None = None,
) -> tuple[None, torch.Tensor, None]:
    """The blocks of one new token per row: (None, int32 [Hi,B,K], None), in `topk_out` if given.

    q [B,Hi,Di]. The tokens of a speculative draft are rows of their own, with the same slot id and
    growing `seq_lens`.
    """
    _refuse(sink=sink)
    _refuse_other("use_dense_main_attn", use_dense_main_attn, False)
    _refuse_index_options(score_type, disable_index_value)
    pages = _Pages(req_to_token, slot_ids, block_size, page_size, max_seqlen)
    ids = msa_cpp.index_select(
        q, pages.index_keys(k_cache), cu_seqlens_q=uniform_cu_seqlens(q.shape[0], 1, q.device),
        seq_lens=int32(seq_lens), **pages.table, topk=topk, block_size=block_size,
        init_blocks=init_blocks, local_blocks=local_blocks, max_seqlen_q=1,
        max_seqlen_k=max_seqlen, out=topk_out)
    return None, ids, None


def flash_prefill_with_gqa_share_sparse(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, sink: torch.Tensor | None,
    req_to_token: torch.Tensor, slot_ids: torch.Tensor, topk_idx: torch.Tensor, block_size_q: int,
    block_size_k: int, cu_seqlens: torch.Tensor, seq_lens: torch.Tensor,
    prefix_lens: torch.Tensor, max_seqlen_q: int, sm_scale: float | None = None,
    use_tma: bool = True, cu_seqblocks_q: torch.Tensor | None = None,
    max_seqblock_q: int | None = None, q_scale: float | None = None, k_scale: float | None = None,
    v_scale: float | None = None, page_size: int = 1, loc_mapping: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a prefill chunk over its blocks: [T,Hq,D] of the dtype of q.

    q [T,Hq,D]; k_cache, v_cache [slots,Hkv,D]; topk_idx int32 [Hkv,T,K] in any order, -1 behind.
    """
    _refuse(sink=sink, loc_mapping=loc_mapping)
    _refuse_scales(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    _refuse_other("block_size_q", block_size_q, 1)
    pages = _Pages(req_to_token, slot_ids, block_size_k, page_size)
    batch = msa_cpp.Batch(
        int32(cu_seqlens), seq_lens=int32(seq_lens), **pages.table,
        q_offset=int32(prefix_lens), block_size=block_size_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=NO_BOUND)
    return msa_cpp.sparse_attention(q, pages.rows(k_cache), pages.rows(v_cache), topk_idx,
                                    batch=batch, softmax_scale=sm_scale)


def flash_decode_with_gqa_share_sparse(
    q: torch.Tensor, sink: torch.Tensor | None, k_cache: torch.Tensor, v_cache: torch.Tensor,
    req_to_token: torch.Tensor, seq_lens: torch.Tensor, slot_ids: torch.Tensor, block_size: int,
    topk_idx: torch.Tensor, sm_scale: float | None = None, use_tma: bool = True,
    page_size: int = 0, q_scale: float | None = None, k_scale: float | None = None,
    v_scale: float | None = None, hisparse_slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new token per row over its blocks: [B,Hq,D] of the dtype of q."""
    _refuse(sink=sink, hisparse_slots=hisparse_slots)
    _refuse_scales(q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    pages = _Pages(req_to_token, slot_ids, block_size, page_size)
    batch = msa_cpp.Batch(
        uniform_cu_seqlens(q.shape[0], 1, q.device), seq_lens=int32(seq_lens),
        **pages.table, block_size=block_size, max_seqlen_q=1, max_seqlen_k=NO_BOUND)
    return msa_cpp.sparse_attention(q, pages.rows(k_cache), pages.rows(v_cache), topk_idx,
                                    batch=batch, softmax_scale=sm_scale)


class _Pages:
    """Slot-major caches as overlapping pages, see the head of this file.

    table: int32 [requests,blocks], the slot of the first token of each block, and which rows of it
    are the sequences', as a `msa_cpp.Batch` takes them.
    """

    def __init__(self, req_to_token: torch.Tensor, slot_ids: torch.Tensor, block_size: int,
                 page_size: int, longest: int = NO_BOUND) -> None:
        if page_size <= 1:  # the call does not say
            page_size = _page_size_of_the_server()
        if page_size % block_size != 0:
            raise NotImplementedError(f"page_size: got {page_size}, supported are multiples of the "
                                      f"{block_size} tokens of a block (--page-size {block_size})")
        self._block_size = block_size
        requests, length = req_to_token.shape
        blocks = -(-min(longest, length) // block_size)
        row, token = req_to_token.stride()
        self.table: dict[str, Any] = dict(
            page_table=req_to_token.as_strided((requests, blocks), (row, token * block_size)),
            page_rows=low_words(slot_ids))

    def rows(self, cache: torch.Tensor) -> torch.Tensor:
        """[slots,H,D] as pages [slots-Bk+1,H,Bk,D]"""
        slots, heads, dim = cache.shape
        slot, head, inner = cache.stride()
        pages = max(slots - self._block_size + 1, 0)
        return cache.as_strided((pages, heads, self._block_size, dim), (slot, head, slot, inner))

    def index_keys(self, cache: torch.Tensor) -> torch.Tensor:
        """[slots,1,Di] as pages [slots-Bk+1,Bk,Di]"""
        if cache.shape[1] != 1:
            raise NotImplementedError(f"k_cache: got {cache.shape[1]} index key heads, supported "
                                      "is 1")
        return self.rows(cache)[:, 0]


def _page_size_of_the_server() -> int:
    """As the running server has it; 1 outside of one."""
    module = sys.modules.get("sglang.srt.runtime_context")
    if module is None:
        return 1
    try:
        schedule = module.get_schedule()
    except ValueError:  # "not published": no server has been configured in this process
        return 1
    return int(schedule.page_size or 1)


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}: given, supported is None")


def _refuse_other(name: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise NotImplementedError(f"{name}: got {value!r}, supported is {supported!r}")


def _refuse_scales(**scales: float | None) -> None:
    for name, scale in scales.items():
        _refuse_other(name, 1.0 if scale is None else scale, 1.0)


def _refuse_index_options(score_type: str, disable_index_value: bool) -> None:
    _refuse_other("score_type", score_type, "max")
    _refuse_other("disable_index_value", bool(disable_index_value), True)


_OPS = "sglang.kernels.ops.attention.minimax_sparse"
_engine = Engine("sglang", ("0.5.23",), {
    f"{_OPS}.prefill.flash_with_topk_idx": (flash_prefill_with_topk_index,),
    f"{_OPS}.prefill.topk_sparse": (flash_prefill_with_gqa_share_sparse,),
    f"{_OPS}.decode.flash_with_topk_idx": (flash_decode_with_topk_idx,),
    f"{_OPS}.decode.topk_sparse": (flash_decode_with_gqa_share_sparse,),
})
patch, unpatch = _engine.patch, _engine.unpatch


def plugin() -> None:
    """Entry point of the group sglang.srt.plugins: patches where MSA_SGLANG=1 asks for it."""
    if os.environ.get("MSA_SGLANG") == "1":
        patch()
