"""The operators of MiniMax Sparse Attention on NumPy arrays and torch tensors.

Shapes are written with the letters of ``msa/problem.h``:

======  ========================================================================================
B       sequences of the batch
T, S    query and key tokens, packed over the batch
P       pages of a paged cache
Hq      query heads; Hkv: key/value heads, query head h belongs to h // (Hq / Hkv); Hi = Hkv
D, Di   head dims of the attention and of the index branch
Bk      block size in tokens, also the page size; K: blocks chosen per (token, KV head)
======  ========================================================================================

**Keys** are packed, ``k, v [S,Hkv,D]`` and ``k_idx [S,Di]`` with `cu_seqlens_k`, or paged,
``[P,Hkv,Bk,D]`` and ``[P,Bk,Di]`` with `seq_lens` and `page_table`. Strides are free but for the
innermost one, so views of interleaved pools are fine. Nothing is ever copied or converted: what
would need it is an error that names the stride or the dtype.

**Arguments of every batched operator**

- `cu_seqlens_q` int32 ``[B+1]``: sequence b has the query rows ``cu_seqlens_q[b]`` up to
  ``cu_seqlens_q[b+1]``. `cu_seqlens_k` int32 ``[B+1]``: the same for packed keys.
- `seq_lens` int32 ``[B]``: tokens in the paged cache, the new ones included. `page_table` int32
  ``[B,max_pages]``: the page of each block.
- `causal`: query i of sequence b stands at position ``kv_len - q_len + i`` and sees the keys up to
  it. `q_offset` int32 ``[B]`` sets the position of the first query instead. False: every key is
  visible.
- `block_offset` int32 ``[B]``: the given keys are a shard that starts at this block; ids stay
  global, and `merge` combines the shards' results exactly.
- `max_seqlen_q`, `max_seqlen_k`: bounds of the lengths in tokens. Optional on the CPU; needed for
  CUDA tensors, whose lengths are never read back.
- `out` and the like: an array to write into; without it one is made, of the caller's kind and on
  the same device.
- `workspace`: a contiguous vector of at least ``plan.workspace_bytes`` bytes, 64-byte aligned.
  Without it memory is kept and reused by the library (CPU) or allocated by torch (CUDA).
- `plan`: an explicit `Plan`; without it plans are made and cached. `backend`: a name of
  `backends()`; "auto" takes the best one.

Integer metadata live on the device of the tensors. Rows without a visible key give zeros, an LSE of
-inf and ids of -1. Work on CUDA tensors is enqueued on torch's current stream.

**Errors** name the argument, what was given and what is supported, and leave outputs untouched:
TypeError for what is no array or of a wrong dtype, ValueError for shapes, strides, devices and
contents, NotImplementedError for what no backend can do here.

Source of the operators: MiniMax Sparse Attention, arXiv 2606.13392. Calls from several threads are
fine, the GIL is released during the work, and results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Union

from . import _core

Array = Any  # numpy.ndarray, torch.Tensor, or for inputs anything that speaks DLPack
Plan = _core.Plan

__all__ = [
    "Backend", "Plan", "append_paged", "backends", "block_lists", "block_mass", "dense_attention",
    "index_scores", "index_select", "merge", "msa_layer_decode", "num_threads", "plan",
    "select_blocks", "set_num_threads", "sparse_attention", "sparse_decode",
]


def index_select(
    q_idx: Array, k_idx: Array, *,
    cu_seqlens_q: Array, cu_seqlens_k: Array | None = None,
    seq_lens: Array | None = None, page_table: Array | None = None,
    q_offset: Array | None = None, block_offset: Array | None = None, causal: bool = True,
    topk: int = 16, block_size: int = 128, init_blocks: int = 0, local_blocks: int = 1,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    out: Array | None = None, scores_out: Array | None = None,
    workspace: Array | None = None, plan: Plan | None = None, backend: str = "auto",
) -> Array:
    """index"""
    batch = (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset)
    options = (causal, block_size, topk, init_blocks, local_blocks, None, max_seqlen_q,
               max_seqlen_k)
    return _core.index_select((q_idx, k_idx, out, scores_out), batch, options, plan, workspace,
                              backend)[0]


def sparse_attention(
    q: Array, k: Array, v: Array, block_ids: Array, *,
    cu_seqlens_q: Array, cu_seqlens_k: Array | None = None,
    seq_lens: Array | None = None, page_table: Array | None = None,
    q_offset: Array | None = None, block_offset: Array | None = None, causal: bool = True,
    block_size: int = 128, softmax_scale: float | None = None,
    k_scale: None = None, v_scale: None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    out: Array | None = None, lse: Array | None = None, return_lse: bool = False,
    workspace: Array | None = None, plan: Plan | None = None, backend: str = "auto",
) -> Array | tuple[Array, Array]:
    """sparse"""
    batch = (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset)
    options = (causal, block_size, None, None, None, softmax_scale, max_seqlen_q, max_seqlen_k)
    out, lse = _core.sparse_attention(
        (q, k, v, block_ids, out, return_lse if lse is None else lse), batch, options, plan,
        workspace, backend)
    return (out, lse) if return_lse else out


def dense_attention(
    q: Array, k: Array, v: Array, *,
    cu_seqlens_q: Array, cu_seqlens_k: Array | None = None,
    seq_lens: Array | None = None, page_table: Array | None = None,
    q_offset: Array | None = None, block_offset: Array | None = None, causal: bool = True,
    block_size: int = 128, softmax_scale: float | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    out: Array | None = None, lse: Array | None = None, return_lse: bool = False,
    block_max: Array | None = None,
    workspace: Array | None = None, plan: Plan | None = None, backend: str = "auto",
) -> Array | tuple[Array, Array]:
    """dense"""
    batch = (cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset)
    options = (causal, block_size, None, None, None, softmax_scale, max_seqlen_q, max_seqlen_k)
    out, lse, _ = _core.dense_attention(
        (q, k, v, out, return_lse if lse is None else lse, block_max), batch, options, plan,
        workspace, backend)
    return (out, lse) if return_lse else out
