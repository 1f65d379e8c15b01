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
would need it is an error that names the stride or the dtype. Only under `torch.autocast` are
queries and keys of torch cast, as `msa_cpp.torch_ops` says.

**The batch** is a `Batch`, made once and given as ``batch=`` to every call, or its fields as
keywords of a call:

- `cu_seqlens_q` int32 ``[B+1]``: sequence b has the query rows ``cu_seqlens_q[b]`` up to
  ``cu_seqlens_q[b+1]``. `cu_seqlens_k` int32 ``[B+1]``: the same for packed keys.
- `seq_lens` int32 ``[B]``: tokens in the paged cache, the new ones included. `page_table` int32
  ``[B,max_pages]``: the page of each block. With `page_rows` int32 ``[B]`` it may be larger,
  ``[rows,max_pages]``, sequence b having row ``page_rows[b]``, or a flat list ``[entries]``, in
  which entry ``page_rows[b]`` is the first of sequence b. Strides of both are free.
- `causal`: query i of sequence b stands at position ``kv_len - q_len + i`` and sees the keys up to
  it. `q_offset` int32 ``[B]`` sets the position of the first query instead. False: every key is
  visible.
- `block_size`: Bk, default 128.
- `block_offset` int32 ``[B]``: the given keys are a shard that starts at this block; ids stay
  global, and `merge` combines the shards' results exactly.
- `max_seqlen_q`, `max_seqlen_k`: bounds of the lengths in tokens. Optional on the CPU; needed for
  CUDA tensors, whose lengths are never read back.

**Results** follow one rule. A function returns its result, or the tuple of its results in the order
of its description. An optional result comes behind them where ``return_<name>=True`` asks for it.
Every result can be written into an array of the caller's, which is given under the result's name,
`out` where there is one: `dq=`, `lse=`, ...; an optional one is then filled, returned or not. Other
results are made, of the caller's kind and on the same device.

**How a call runs**: keywords of every operator.

- `workspace`: a contiguous vector of at least ``plan.workspace_bytes`` bytes, 64-byte aligned.
  Without it memory is kept and reused by the library (CPU) or allocated by torch (CUDA).
- `plan`: an explicit `Plan`; without it plans are made and cached. `backend`: a name of
  `backends()`; "auto" takes the best one.

Integer metadata live on the device of the tensors. Rows without a visible key give zeros, an LSE of
-inf and ids of -1. NaN and infinities in keys and values that a query may not see leave its row
alone; logits may be as large as 2^126. Work on CUDA tensors is enqueued on torch's current stream.

**Errors** name the argument, what was given and what is supported, and leave outputs untouched:
TypeError for what is no array or of a wrong dtype, ValueError for shapes, strides, devices and
contents, NotImplementedError for what no backend can do here.

Source of the operators: MiniMax Sparse Attention, arXiv 2606.13392. Calls from several threads are
fine, the GIL is released during the work, and results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ._call import call, deprecated, renamed, wanted
from .batch import Batch, Keywords, Run
from .plans import Backend, Plan, backends, num_threads, plan, set_num_threads

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

# The arrays of a call are of one kind, and so is its result. At run time inputs may be anything
# that speaks DLPack.
Array = TypeVar("Array", np.ndarray, "torch.Tensor")

__all__ = [
    "Backend", "Batch", "Plan", "append_paged", "backends", "block_lists", "block_mass",
    "dense_attention", "index_scores", "index_select", "merge", "merge_lists", "msa_layer",
    "msa_layer_decode", "num_threads", "plan", "select_blocks", "set_num_threads",
    "sparse_attention", "sparse_decode",
]


# ---- the index branch ----------------------------------------------------------------------------


def index_scores(
    q_idx: Array, k_idx: Array, *, out: Array | None = None, batch: Batch | None = None,
    **keywords: Unpack[Keywords],
) -> Array:
    """The score of each block: the largest product of the index query with a key of the block.

    ``scores[r,t,j] = max over the visible tokens s of block j of q_idx[t,r] . k_idx[s]``, without a
    scale; -inf where no token is visible. A NaN product counts as -inf.

    Args:
        q_idx: ``[T,Hi,Di]``, float32, bfloat16 or float16.
        k_idx: ``[S,Di]`` or pages ``[P,Bk,Di]``, of the same dtype: one index key per token.
        out: float32 ``[Hi,T,blocks]`` of any strides, with ``blocks >= ceil(longest / Bk)``;
            columns behind a sequence's blocks become -inf.

    The other arguments and the errors are those of the module. Returns `out`, made with
    ``ceil(max_seqlen_k / Bk)`` columns, or with those of the longest sequence, if it is not given.
    Source: the block score of the index branch, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> keys = np.array([[1.0], [5.0], [2.0], [3.0]], np.float32)  # S = 4, Di = 1
    >>> lengths = np.array([0, 4], np.int32)
    >>> msa_cpp.index_scores(np.ones((4, 1, 1), np.float32), keys, cu_seqlens_q=lengths,
    ...                      cu_seqlens_k=lengths, block_size=2)
    array([[[  1., -inf],
            [  5., -inf],
            [  5.,   2.],
            [  5.,   3.]]], dtype=float32)
    """
    return call("index_scores", (q_idx, k_idx, out), (True,), batch, keywords)


def select_blocks(
    scores: Array, topk: int, *, num_valid_blocks: int | Array | None = None,
    init_blocks: int = 0, local_blocks: int = 1, out: Array | None = None,
    **keywords: Unpack[Run],
) -> Array:
    """The ids of the blocks to attend to: the forced ones, then the best-scored ones.

    Exactly ``min(topk, num_valid_blocks)`` ids in ascending order, then -1. Forced blocks count
    among them: the last `local_blocks` valid ones and those with ids below `init_blocks`. Of equal
    scores the lower id wins; NaN counts as -inf. Selection is independent per head.

    Args:
        scores: float32 ``[Hi,T,blocks]`` of any strides.
        topk: K, blocks.
        num_valid_blocks: how many of a row's columns count: a number for all rows, or int32
            ``[T]`` (with causal attention the blocks up to the query's own); default all.
        out: int32 ``[Hi,T,K]``.

    Errors: ValueError for ``init_blocks + local_blocks > topk`` and for those of the module.
    Source: block selection of the index branch, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> scores = np.array([[[0.5, 2.0, 1.0, 0.1], [3.0, 0.2, 0.3, 0.4]]], np.float32)
    >>> msa_cpp.select_blocks(scores, 2)
    array([[[1, 3],
            [0, 3]]], dtype=int32)
    >>> msa_cpp.select_blocks(scores, 2, num_valid_blocks=1)
    array([[[ 0, -1],
            [ 0, -1]]], dtype=int32)
    """
    if isinstance(num_valid_blocks, (int, np.integer)) and hasattr(scores, "shape"):
        # All rows alike: fewer columns.
        if not 0 <= num_valid_blocks <= scores.shape[-1]:
            raise ValueError(f"num_valid_blocks: got {num_valid_blocks}, expected "
                             f"0..{scores.shape[-1]}, the columns of scores")
        scores, num_valid_blocks = scores[..., :num_valid_blocks], None
    return call("select_blocks", (scores, num_valid_blocks, out), (True,), None, keywords, None,
                topk, init_blocks, local_blocks)


def index_select(
    q_idx: Array, k_idx: Array, *, topk: int = 16, init_blocks: int = 0, local_blocks: int = 1,
    out: Array | None = None, scores: Array | None = None, return_scores: bool = False,
    batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array | Any:
    """`index_scores` and `select_blocks` in one pass; no score matrix is ever written.

    The last of the `local_blocks` forced ones is the block of the query's position, and without
    `causal` the last block of the given keys, also of a shard.

    Args:
        q_idx: ``[T,Hi,Di]``, float32, bfloat16 or float16.
        k_idx: ``[S,Di]`` or pages ``[P,Bk,Di]``, of the same dtype.
        topk, init_blocks, local_blocks: K and the forced blocks among the K.
        out: int32 ``[Hi,T,K]``: ids in ascending order, -1 in the unused tail.
        scores: optional result, float32 ``[Hi,T,K]``: the score of each id, +inf if forced, -inf in
            the tail. Shards of the keys combine by the best of these.

    The other arguments and the errors are those of the module. `scores_out` is a deprecated name of
    `scores`.
    Source: the index branch of MSA, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> keys = np.array([[9.0], [0.0], [1.0], [2.0], [3.0], [1.0]], np.float32)
    >>> lengths = np.array([0, 6], np.int32)
    >>> msa_cpp.index_select(np.ones((6, 1, 1), np.float32), keys, cu_seqlens_q=lengths,
    ...                      cu_seqlens_k=lengths, topk=2, block_size=2)[0, ::2]
    array([[ 0, -1],
           [ 0,  1],
           [ 0,  2]], dtype=int32)
    """
    scores = renamed(keywords, "scores_out", "scores", scores)
    return call("index_select", (q_idx, k_idx, out, wanted(scores, return_scores)),
                (True, return_scores), batch, keywords, None, topk, init_blocks, local_blocks)


# ---- attention -----------------------------------------------------------------------------------


def sparse_attention(
    q: Array, k: Array, v: Array, block_ids: Array, *, softmax_scale: float | None = None,
    out: Array | None = None, lse: Array | None = None, return_lse: bool = False,
    batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array | Any:
    """Exact softmax attention over the visible tokens of the listed blocks.

    Args:
        q: ``[T,Hq,D]``, float32, bfloat16 or float16.
        k, v: ``[S,Hkv,D]`` or pages ``[P,Hkv,Bk,D]``, of the same dtype.
        block_ids: int32 ``[Hkv,T,K]``: blocks of the query's own sequence in any order, none
            twice (an error on a CPU; on a GPU it counts once); -1 ends a list. The head stride may
            be 0: one list for all heads.
        softmax_scale: factor of the logits; default ``1/sqrt(D)``.
        out: ``[T,Hq,D]`` of the dtype of q, or float32.
        lse: optional result, float32 ``[T,Hq]``: the natural logarithm of the sum of exp(logits).

    The other arguments and the errors are those of the module.
    Source: sparse attention of MSA, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((6, 2, 4), dtype=np.float32) for _ in range(3))
    >>> lengths = np.array([0, 6], np.int32)
    >>> batch = msa_cpp.Batch(cu_seqlens_q=lengths, cu_seqlens_k=lengths, block_size=2)
    >>> all_blocks = np.broadcast_to(np.arange(3, dtype=np.int32), (2, 6, 3))
    >>> out = msa_cpp.sparse_attention(q, k, v, all_blocks, batch=batch)
    >>> np.allclose(out, msa_cpp.dense_attention(q, k, v, batch=batch), atol=1e-6)
    True
    """
    return call("sparse_attention", (q, k, v, block_ids, out, wanted(lse, return_lse)),
                (True, return_lse), batch, keywords, softmax_scale)


def msa_layer(
    q: Array, q_idx: Array, k: Array, v: Array, k_idx: Array, *, topk: int = 16,
    init_blocks: int = 0, local_blocks: int = 1, softmax_scale: float | None = None,
    out: Array | None = None, lse: Array | None = None, block_ids: Array | None = None,
    return_lse: bool = False, return_block_ids: bool = False, batch: Batch | None = None,
    **keywords: Unpack[Keywords],
) -> Array | Any:
    """A sparse layer: `index_select`, then `sparse_attention` over the blocks that it chose.

    One operator of the library; the CUDA backend joins a decoding step's two in two launches.

    Args:
        q, q_idx: ``[T,Hq,D]`` and ``[T,Hi,Di]``, of one dtype.
        k, v, k_idx: ``[S,Hkv,D]`` twice and ``[S,Di]``, or the pages of a cache that has the new
            tokens already (`append_paged`), ``[P,Hkv,Bk,D]`` twice and ``[P,Bk,Di]``.
        lse, block_ids: optional results: float32 ``[T,Hq]`` and int32 ``[Hkv,T,K]``.

    The other arguments and the errors are those of `index_select` and `sparse_attention`.
    Source: arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> pages, index = np.ones((3, 1, 2, 4), np.float32), np.ones((3, 2, 4), np.float32)
    >>> out, ids = msa_cpp.msa_layer(
    ...     np.ones((1, 2, 4), np.float32), np.ones((1, 1, 4), np.float32), pages, pages, index,
    ...     page_table=np.array([[2, 0, 1]], np.int32), seq_lens=np.array([5], np.int32),
    ...     cu_seqlens_q=np.array([0, 1], np.int32), topk=2, block_size=2,
    ...     return_block_ids=True)
    >>> ids, out.shape
    (array([[[0, 2]]], dtype=int32), (1, 2, 4))
    """
    return call("msa_layer", (q, q_idx, k, v, k_idx, out, wanted(lse, return_lse),
                              wanted(block_ids, return_block_ids)),
                (True, return_lse, return_block_ids), batch, keywords, softmax_scale, topk,
                init_blocks, local_blocks)


def dense_attention(
    q: Array, k: Array, v: Array, *, softmax_scale: float | None = None, out: Array | None = None,
    lse: Array | None = None, block_max: Array | None = None, return_lse: bool = False,
    return_block_max: bool = False, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array | Any:
    """Softmax attention over every visible token.

    Args:
        q: ``[T,Hq,D]``, float32, bfloat16 or float16.
        k, v: ``[S,Hkv,D]`` or pages ``[P,Hkv,Bk,D]``, of the same dtype.
        softmax_scale: factor of the logits; default ``1/sqrt(D)``.
        out: ``[T,Hq,D]`` of the dtype of q, or float32.
        lse: optional result, float32 ``[T,Hq]``: the natural logarithm of the sum of exp(logits).
        block_max: optional result, float32 ``[Hq,T,blocks]``: the unscaled maximum of each block,
            as `index_scores` would find it.

    The other arguments and the errors are those of the module.
    Source: Vaswani et al., arXiv 1706.03762.

    >>> import numpy as np, msa_cpp
    >>> ones = np.ones((3, 1, 4), np.float32)
    >>> lengths = np.array([0, 3], np.int32)
    >>> out, lse = msa_cpp.dense_attention(ones, ones, ones, cu_seqlens_q=lengths,
    ...                                    cu_seqlens_k=lengths, softmax_scale=1.0, return_lse=True)
    >>> lse.ravel().round(3)  # 4 + ln 1, ln 2, ln 3: each query sees one key more
    array([4.   , 4.693, 5.099], dtype=float32)
    """
    return call("dense_attention", (q, k, v, out, wanted(lse, return_lse),
                                    wanted(block_max, return_block_max)),
                (True, return_lse, return_block_max), batch, keywords, softmax_scale)


def merge(
    o_parts: Array, lse_parts: Array, *, out: Array | None = None, lse: Array | None = None,
    return_lse: bool = False, **keywords: Unpack[Run],
) -> Array | Any:
    """Combines attention over disjoint sets of keys (shards, splits) exactly.

    ``a = max_i lse_i; lse = a + ln sum_i exp(lse_i - a)``, and out is the mean of the parts with
    weights ``exp(lse_i - a)``. Parts with an LSE of -inf count nothing.

    Args:
        o_parts: ``[parts,T,Hq,D]``, float32, bfloat16 or float16, parts >= 1.
        lse_parts: float32 ``[parts,T,Hq]``, natural logarithms.
        out: ``[T,Hq,D]`` of the dtype of o_parts, or float32.
        lse: optional result, float32 ``[T,Hq]``.

    Errors are those of the module.
    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867.

    >>> import numpy as np, msa_cpp
    >>> parts = np.array([1.0, 3.0], np.float32).reshape(2, 1, 1, 1)
    >>> msa_cpp.merge(parts, np.zeros((2, 1, 1), np.float32)).item()  # equal weights
    2.0
    """
    return call("merge", (o_parts, lse_parts, out, wanted(lse, return_lse)), (True, return_lse),
                None, keywords)


def merge_lists(
    scores_parts: Array, block_ids_parts: Array, *, out: Array | None = None,
    scores: Array | None = None, return_scores: bool = False, **keywords: Unpack[Run],
) -> Array | Any:
    """The K best of several lists of blocks, each chosen of another shard of the keys.

    What `index_select` would choose of all shards at once: the best scores, ties to the lower id,
    NaN as -inf; forced blocks stay, having +inf.

    Args:
        scores_parts: float32 ``[parts,Hi,T,K]``, parts >= 1: `scores` of each shard.
        block_ids_parts: int32 ``[parts,Hi,T,K]`` in any order; negative ids are padding. No two
            parts name the same block.
        out: int32 ``[Hi,T,K]``: ids in ascending order, -1 in the unused tail.
        scores: optional result, float32 ``[Hi,T,K]``: the score of each id, -inf in the tail.

    Errors are those of the module. Source: exact merging of selections, as `merge` does it for
    values.

    >>> import numpy as np, msa_cpp
    >>> scores = np.array([[3.0, 1.0], [2.0, np.inf]], np.float32).reshape(2, 1, 1, 2)
    >>> ids = np.array([[0, 1], [4, 5]], np.int32).reshape(2, 1, 1, 2)
    >>> msa_cpp.merge_lists(scores, ids)
    array([[[0, 5]]], dtype=int32)
    """
    scores = renamed(keywords, "scores_out", "scores", scores)
    return call("merge_lists", (scores_parts, block_ids_parts, out, wanted(scores, return_scores)),
                (True, return_scores), None, keywords)


# ---- block lists, caches, masses -----------------------------------------------------------------


def block_lists(
    block_ids: Array, *, num_blocks: int | None = None, row_ptr: Array | None = None,
    entries: Array | None = None, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> tuple[Array, Array]:
    """The inverse of block lists: which queries chose a block, as CSR per KV head.

    Blocks of the sequences follow each other: ``NB = sum over sequences of ceil(kv_len / Bk)``. An
    entry is ``token * K + slot``, ascending per block; unused entries are -1.

    Args:
        block_ids: int32 ``[Hkv,T,K]``.
        num_blocks: NB. Optional on the CPU; needed for CUDA tensors and under
            ``torch.compile(fullgraph=True)``.
        row_ptr, entries: the results, int32 ``[Hkv,NB+1]`` and ``[Hkv,T*K]``.

    The other arguments and the errors are those of the module. ``out=(row_ptr, entries)`` is
    deprecated.
    Source: the KV-outer order of MSA, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> ids = np.array([[[0, -1], [0, 1], [1, -1]]], np.int32)
    >>> lengths = np.array([0, 3], np.int32)
    >>> row_ptr, entries = msa_cpp.block_lists(ids, cu_seqlens_q=lengths, cu_seqlens_k=lengths,
    ...                                        block_size=2)
    >>> row_ptr, entries
    (array([[0, 2, 4]], dtype=int32), array([[ 0,  2,  3,  4, -1, -1]], dtype=int32))
    """
    if "out" in keywords:
        row_ptr, entries = renamed(keywords, "out", "row_ptr and entries", row_ptr)
    return call("block_lists", (block_ids, row_ptr, entries), (True, True), batch, keywords,
                num_blocks=num_blocks)


def append_paged(
    k: Array | None, v: Array | None, k_idx: Array | None = None, *,
    k_pages: Array | None = None, v_pages: Array | None = None, k_idx_pages: Array | None = None,
    batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> None:
    """Writes new keys, values and index keys into their pages, in place.

    The rows of sequence b go to its last ``q_len`` positions, ``seq_lens[b] - q_len`` onwards:
    `seq_lens` counts the new tokens already. Everything else in the pages stays as it is.

    Args:
        k, v: ``[T,Hkv,D]``, float32, bfloat16 or float16; both or neither.
        k_idx: ``[T,Di]``, of the same dtype, or None.
        k_pages, v_pages: ``[P,Hkv,Bk,D]``; k_idx_pages: ``[P,Bk,Di]``: for what is given.

    The other arguments and the errors are those of the module. Keys that require gradients are a
    NotImplementedError: a cache keeps none. Source: paged caches, Kwon et al., arXiv 2309.06180.

    >>> import numpy as np, msa_cpp
    >>> pages = np.zeros((2, 2, 1), np.float32)  # P = 2, Bk = 2, Di = 1
    >>> msa_cpp.append_paged(None, None, np.array([[7.0]], np.float32), k_idx_pages=pages,
    ...                      page_table=np.array([[1, 0]], np.int32), block_size=2,
    ...                      seq_lens=np.array([3], np.int32),
    ...                      cu_seqlens_q=np.array([0, 1], np.int32))
    >>> pages.ravel()  # token 2 is the first of block 1, which lies in page 0
    array([7., 0., 0., 0.], dtype=float32)
    """
    call("append_paged", (k, v, k_idx, k_pages, v_pages, k_idx_pages), (), batch, keywords)


def block_mass(
    q: Array, k: Array, lse: Array, *, softmax_scale: float | None = None,
    out: Array | None = None, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array:
    """The attention mass of each block, the mean over the heads of a group.

    ``mass[r,t,j] = mean over heads h of group r of the sum over visible tokens s of block j of
    exp(q[t,h] . k[s] * scale - lse[t,h])``: the oracle that recall and kept mass are measured by.
    From ``|lse| = 2^24`` on, logits within ``2^-21 |lse|`` of it count as equal to it.

    Args:
        q: ``[T,Hq,D]``, float32, bfloat16 or float16.
        k: ``[S,Hkv,D]`` or pages ``[P,Hkv,Bk,D]``, of the same dtype.
        lse: float32 ``[T,Hq]`` of `dense_attention` under the same scale.
        out: float32 ``[Hkv,T,blocks]``, 0 where nothing is visible.

    The other arguments and the errors are those of the module. It has as many columns as that
    of `index_scores`. Source: attention recall of MSA, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> ones = np.ones((4, 1, 2), np.float32)
    >>> lengths = np.array([0, 4], np.int32)
    >>> batch = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths, block_size=2)
    >>> _, lse = msa_cpp.dense_attention(ones, ones, ones, return_lse=True, **batch)
    >>> msa_cpp.block_mass(ones, ones, lse, **batch).round(2)
    array([[[1.  , 0.  ],
            [1.  , 0.  ],
            [0.67, 0.33],
            [0.5 , 0.5 ]]], dtype=float32)
    """
    return call("block_mass", (q, k, lse, out), (True,), batch, keywords, softmax_scale)


# ---- old names, until 0.3 ------------------------------------------------------------------------


def sparse_decode(*args: Any, **keywords: Any) -> Any:
    """A deprecated name of `sparse_attention`; `max_q_len` is one of `max_seqlen_q`."""
    deprecated("sparse_decode", "sparse_attention")
    return sparse_attention(*args, **keywords)


def msa_layer_decode(
    q: Array, q_idx: Array, k_pages: Array, v_pages: Array, k_idx_pages: Array, *,
    ids_out: Array | None = None, **keywords: Any,
) -> Any:
    """A deprecated name of `msa_layer`; `ids_out` is one of `block_ids`, `max_q_len` of
    `max_seqlen_q`."""
    deprecated("msa_layer_decode", "msa_layer")
    return msa_layer(q, q_idx, k_pages, v_pages, k_idx_pages, block_ids=ids_out, **keywords)
