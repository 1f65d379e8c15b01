"""MiniMax-M3's sparse attention in vLLM, over msa_cpp.

    MSA_VLLM=1 vllm serve ...           # the plugin calls patch() in every process of the engine
    msa_cpp.compat.vllm.patch()         # or by hand; unpatch() takes it back

The functions below stand for those of vllm/models/minimax_m3/common/ops (index_topk.py and
sparse_attn.py, read in vLLM 0.33 and main of November 2026), with the same arguments and results.
Caches are read where they lie and outputs written in place, whatever their strides but the last:

    kv_cache        [blocks,Hkv,128,2*D], K then V in the last axis; NHD or HND in memory, or a
                    slice of a pool that holds all layers
    index_kv_cache  [blocks,128,Di]
    ids             [Hi,>=T,K], as vLLM's token-major buffer seen through transpose(0, 1)

Decode batches are uniform (`decode_query_len` tokens per request, several with speculation) or
ragged; requests of length 0 are padding of a CUDA graph and give zeros and ids of -1. Nothing is
copied to the host, so everything can be captured.

What differs: of equal scores the lower block wins, and ids come ascending. What is handed back to
vLLM's own functions, with one line in the log: 8-bit caches, and what no backend here computes.
"""

from __future__ import annotations

import os

import msa_cpp
import torch

from ._calls import BLOCK, NO_BOUND, uniform_cu_seqlens, valid_blocks
from ._engine import Engine

FORCED_INIT, FORCED_LOCAL = 1e30, 1e29  # the scores of forced blocks, as vLLM writes them


def minimax_m3_index_score(
    idx_q: torch.Tensor, index_kv_cache: torch.Tensor, block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, prefix_lens: torch.Tensor,
    max_query_len: int, max_seq_len: int, num_kv_heads: int,
) -> torch.Tensor:
    """Block scores of a prefill chunk: float32 [Hi,T,blocks], -inf behind a row's causal range.

    idx_q [T,Hi,Di]; prefix_lens [B]: cached tokens before each chunk. Columns are
    ceil(max_seq_len / 128), rounded up to a multiple of 16.
    """
    return msa_cpp.index_scores(
        idx_q, index_kv_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens,
        page_table=block_table, q_offset=prefix_lens, max_seqlen_q=max_query_len,
        max_seqlen_k=max_seq_len, out=_new_scores(idx_q, max_seq_len))


def minimax_m3_index_topk(
    score: torch.Tensor, cu_seqlens_q: torch.Tensor, prefix_lens: torch.Tensor,
    max_query_len: int, topk: int, init_blocks: int, local_blocks: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ids that `minimax_m3_index_score` leads to: int32 [Hi,T,K], a view of `out` if given."""
    tokens = score.shape[1]
    return msa_cpp.select_blocks(
        score, topk, num_valid_blocks=valid_blocks(cu_seqlens_q, prefix_lens, tokens),
        init_blocks=init_blocks, local_blocks=local_blocks, out=_rows_of(out, tokens))


def minimax_m3_index_decode(
    idx_q: torch.Tensor, index_kv_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, max_seq_len: int, topk: int, init_blocks: int, local_blocks: int,
    num_kv_heads: int, decode_query_len: int, max_decode_query_len: int,
    out: torch.Tensor | None = None, score_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores and selection of a uniform decode batch: int32 [Hi,T,K], a view of `out` if given.

    T = B * decode_query_len. No score is written, unless `score_out` asks for them.
    """
    if score_out is not None:
        score = minimax_m3_index_decode_score(
            idx_q, index_kv_cache, block_table, seq_lens, max_seq_len, init_blocks, local_blocks,
            num_kv_heads, decode_query_len, max_decode_query_len, score_out)
        cu_seqlens_q = _decode_rows(idx_q, seq_lens, decode_query_len)
        return minimax_m3_index_topk(score, cu_seqlens_q, seq_lens - decode_query_len,
                                     decode_query_len, topk, init_blocks, local_blocks, out)
    return msa_cpp.index_select(
        idx_q, index_kv_cache, cu_seqlens_q=_decode_rows(idx_q, seq_lens, decode_query_len),
        seq_lens=seq_lens, page_table=block_table, topk=topk, init_blocks=init_blocks,
        local_blocks=local_blocks, max_seqlen_q=decode_query_len, max_seqlen_k=max_seq_len,
        out=_rows_of(out, idx_q.shape[0]))


def minimax_m3_index_decode_score(
    idx_q: torch.Tensor, index_kv_cache: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, max_seq_len: int, init_blocks: int, local_blocks: int,
    num_kv_heads: int, decode_query_len: int, max_decode_query_len: int,
    score_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block scores of a uniform decode batch: float32 [Hi,T,>=blocks], in `score_out` if given.

    Forced blocks score 1e30 (the first ones) and 1e29 (the local ones, which prevail).
    """
    score = _new_scores(idx_q, max_seq_len) if score_out is None else score_out
    cu_seqlens_q = _decode_rows(idx_q, seq_lens, decode_query_len)
    columns = -(-max_seq_len // BLOCK)
    msa_cpp.index_scores(
        idx_q, index_kv_cache, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens,
        page_table=block_table, max_seqlen_q=decode_query_len, max_seqlen_k=max_seq_len,
        out=score[..., :columns])
    valid = valid_blocks(cu_seqlens_q, seq_lens - decode_query_len, idx_q.shape[0])[:, None]
    block = torch.arange(columns, dtype=torch.int32, device=score.device)
    visible = block < valid  # [T,blocks]
    score[..., :columns].masked_fill_(visible & (block < init_blocks), FORCED_INIT)
    score[..., :columns].masked_fill_(visible & (block >= valid - local_blocks), FORCED_LOCAL)
    return score


def minimax_m3_sparse_attn(
    q: torch.Tensor, kv_cache: torch.Tensor, topk_idx: torch.Tensor, block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, prefix_lens: torch.Tensor,
    max_query_len: int, num_kv_heads: int, sm_scale: float, output: torch.Tensor,
    k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
) -> None:
    """Attention of a prefill chunk over its blocks, into `output` [T,Hq,D].

    q [T,Hq,D]; topk_idx [Hkv,T,K] in any order, -1 behind. The scales belong to 8-bit caches.
    """
    k, v = kv_cache.chunk(2, -1)
    msa_cpp.sparse_attention(
        q, k, v, topk_idx, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens,
        page_table=block_table, q_offset=prefix_lens, max_seqlen_q=max_query_len,
        max_seqlen_k=NO_BOUND, softmax_scale=sm_scale, out=output)


def minimax_m3_sparse_attn_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, topk_idx: torch.Tensor, block_table: torch.Tensor,
    seq_lens: torch.Tensor, num_kv_heads: int, sm_scale: float, output: torch.Tensor,
    decode_query_len: int, k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None, query_start_loc: torch.Tensor | None = None,
    token_to_req_indices: torch.Tensor | None = None,
) -> None:
    """Attention of a decode batch over its blocks, into `output` [T,Hq,D].

    query_start_loc [B+1]: the rows of each request where they are not uniform; `decode_query_len`
    is then the most of one request. token_to_req_indices follows from it.
    """
    cu_seqlens_q = (_decode_rows(q, seq_lens, decode_query_len) if query_start_loc is None
                    else query_start_loc)
    k, v = kv_cache.chunk(2, -1)
    batch = msa_cpp.Batch(cu_seqlens_q, seq_lens=seq_lens, page_table=block_table,
                          max_seqlen_q=decode_query_len, max_seqlen_k=NO_BOUND)
    msa_cpp.sparse_attention(q, k, v, topk_idx, batch=batch, softmax_scale=sm_scale, out=output)


def _new_scores(idx_q: torch.Tensor, max_seq_len: int) -> torch.Tensor:
    tokens, heads, _ = idx_q.shape
    columns = -(-max_seq_len // BLOCK)
    return idx_q.new_empty((heads, tokens, -(-columns // 16) * 16), dtype=torch.float32)


def _rows_of(out: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The first rows of a buffer [Hi,>=T,K]."""
    if out is None or out.shape[1] == tokens:
        return out
    if out.shape[1] < tokens:
        raise ValueError(f"out: got {out.shape[1]} rows, expected at least the {tokens} tokens")
    return out[:, :tokens]


def _decode_rows(q: torch.Tensor, seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """cu_seqlens_q of a uniform batch."""
    batch = seq_lens.shape[0]
    if q.shape[0] != batch * length:
        raise ValueError(f"decode_query_len: got {length} for {q.shape[0]} tokens of {batch} "
                         "requests, expected tokens / requests")
    return uniform_cu_seqlens(batch, length, q.device)


_OPS = "vllm.models.minimax_m3.common.ops"
_engine = Engine("vllm", ("0.33",), {
    f"{_OPS}.index_topk": (minimax_m3_index_score, minimax_m3_index_topk, minimax_m3_index_decode,
                           minimax_m3_index_decode_score),
    f"{_OPS}.sparse_attn": (minimax_m3_sparse_attn, minimax_m3_sparse_attn_decode),
})
patch, unpatch = _engine.patch, _engine.unpatch


def plugin() -> None:
    """Entry point of the group vllm.general_plugins: patches where MSA_VLLM=1 asks for it."""
    if os.environ.get("MSA_VLLM") == "1":
        patch()
