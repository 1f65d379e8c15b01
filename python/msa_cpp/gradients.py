"""The operators of training: gradients of attention, and the KL loss of the index branch.

Keys are packed; arguments mean what they mean in `msa_cpp.ops`, and so do the errors. Three rules
are common to the functions here:

- `block_ids` are those of the forward pass. Without them every visible token counts: the support of
  dense attention, and of a warm-up.
- `row_ptr` and `entries` are what `block_lists` makes of `block_ids`; without them they are made in
  the workspace. Who calls more than one of these functions on the same lists makes them once.
- Gradients have the dtype of their argument; an output of float32 that is given receives float32.
  The gradients of the KL loss are small, one over all queries: prefer float32 to float16 there.

Rows whose LSE is -inf have no gradient and add none. The same call gives the same bits, with any
number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._call import call, wanted
from .batch import Batch, Keywords
from .ops import Array

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "dense_attention_backward", "index_lse", "kl_backward", "kl_loss", "sparse_attention_backward",
]


# ---- attention -----------------------------------------------------------------------------------


def sparse_attention_backward(
    q: Array, k: Array, v: Array, block_ids: Array, out: Array, lse: Array, dout: Array, *,
    softmax_scale: float | None = None, row_ptr: Array | None = None,
    entries: Array | None = None, dq: Array | None = None, dk: Array | None = None,
    dv: Array | None = None, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> tuple[Array, Array, Array]:
    """The gradients of `sparse_attention` by q, k and v, given that of its output.

    With ``P = exp(q . k * scale - lse)`` and ``dS = P * (dout . v - out . dout) * scale`` over the
    visible tokens of the listed blocks: ``dq = sum dS k``, and over the queries and heads that read
    a token ``dk = sum dS q`` and ``dv = sum P dout``.

    Args:
        q: ``[T,Hq,D]``, float32, bfloat16 or float16.
        k, v: ``[S,Hkv,D]``, of the same dtype.
        block_ids: int32 ``[Hkv,T,K]``, those of the forward pass.
        out, dout: ``[T,Hq,D]``, the output and its gradient, of the dtype of q, or float32.
        lse: float32 ``[T,Hq]``, as `sparse_attention` returns it.
        row_ptr, entries: int32 ``[Hkv,NB+1]`` and ``[Hkv,T*K]``, as `block_lists` returns them.
        dq, dk, dv: ``[T,Hq,D]`` and twice ``[S,Hkv,D]``, of the dtype of q, or float32.

    The other arguments and the errors are those of `msa_cpp.ops`. Returns ``(dq, dk, dv)``.
    Source: the backward pass of FlashAttention, Dao et al., arXiv 2205.14135.

    >>> import numpy as np, msa_cpp
    >>> q = k = v = np.ones((2, 1, 1), np.float32)  # equal keys: the output is the mean of v
    >>> lengths = np.array([0, 2], np.int32)
    >>> ids, batch = np.zeros((1, 2, 1), np.int32), dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    >>> out, lse = msa_cpp.sparse_attention(q, k, v, ids, return_lse=True, **batch)
    >>> dq, dk, dv = msa_cpp.sparse_attention_backward(q, k, v, ids, out, lse, q, **batch)
    >>> dv.ravel().round(3)  # token 0 is all that query 0 sees and half of what query 1 sees
    array([1.5, 0.5], dtype=float32)
    """
    return call("sparse_attention_backward",
                (q, k, v, block_ids, out, lse, dout, row_ptr, entries, dq, dk, dv),
                (True, True, True), batch, keywords, softmax_scale)


def dense_attention_backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, dout: Array, *,
    softmax_scale: float | None = None, dq: Array | None = None, dk: Array | None = None,
    dv: Array | None = None, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> tuple[Array, Array, Array]:
    """The gradients of `dense_attention` by q, k and v, given that of its output.

    Arguments, formulas and source as in `sparse_attention_backward`, over every visible token.
    Returns ``(dq, dk, dv)``.

    >>> import numpy as np, msa_cpp
    >>> q = k = v = np.ones((3, 1, 1), np.float32)
    >>> lengths = np.array([0, 3], np.int32)
    >>> batch = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    >>> out, lse = msa_cpp.dense_attention(q, k, v, return_lse=True, **batch)
    >>> dq, dk, dv = msa_cpp.dense_attention_backward(q, k, v, out, lse, q, **batch)
    >>> dv.ravel().round(3)  # 1 + 1/2 + 1/3, 1/2 + 1/3, 1/3
    array([1.833, 0.833, 0.333], dtype=float32)
    """
    return call("dense_attention_backward",
                (q, k, v, None, out, lse, dout, None, None, dq, dk, dv), (True, True, True), batch,
                keywords, softmax_scale)


# ---- the index branch ----------------------------------------------------------------------------


def index_lse(
    q_idx: Array, k_idx: Array, block_ids: Array | None = None, *, out: Array | None = None,
    batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array:
    """The LSE of the index logits: what turns them into the student of the KL loss.

    ``lse[t,r] = ln(sum exp(q_idx[t,r] . k_idx[s] / sqrt(Di)))`` over the visible tokens s of the
    listed blocks, of all blocks without a list; -inf where nothing is visible.

    Args:
        q_idx: ``[T,Hi,Di]``, float32, bfloat16 or float16.
        k_idx: ``[S,Di]``, of the same dtype.
        block_ids: int32 ``[Hi,T,K]`` or None.
        out: float32 ``[T,Hi]``.

    The other arguments and the errors are those of `msa_cpp.ops`.
    Source: training of the index branch, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> lengths = np.array([0, 3], np.int32)
    >>> msa_cpp.index_lse(np.zeros((3, 1, 4), np.float32), np.ones((3, 4), np.float32),
    ...                   cu_seqlens_q=lengths, cu_seqlens_k=lengths).ravel().round(3)
    array([0.   , 0.693, 1.099], dtype=float32)
    """
    return call("index_lse", (q_idx, k_idx, block_ids, out), (True,), batch, keywords)


def kl_loss(
    q: Array, k: Array, lse: Array, q_idx: Array, k_idx: Array, index_lse: Array,
    block_ids: Array | None = None, *, softmax_scale: float | None = None,
    out: Array | None = None, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array:
    """The divergence of the index branch from the attention, per query and group.

    ``kl[t,r] = sum P (ln P - ln Pi)`` with the teacher ``P`` the mean over the G heads of
    ``exp(q . k * scale - lse)`` and the student ``Pi = exp(q_idx . k_idx / sqrt(Di) - index_lse)``.
    The loss is its mean over the ``cu_seqlens_q[B]`` queries, without the padding behind them;
    `kl_backward` has its gradient.

    Args:
        q, k: ``[T,Hq,D]`` and ``[S,Hkv,D]``, float32, bfloat16 or float16.
        lse: float32 ``[T,Hq]``, of the attention over the same tokens.
        q_idx, k_idx: ``[T,Hi,Di]`` and ``[S,Di]``, of the same dtype.
        index_lse: float32 ``[T,Hi]``, of `index_lse` over the same tokens.
        block_ids: int32 ``[Hkv,T,K]`` or None.
        softmax_scale: of the teacher; default ``1/sqrt(D)``.
        out: float32 ``[T,Hi]``, 0 where nothing is visible.

    The other arguments and the errors are those of `msa_cpp.ops`.
    Source: training of the index branch, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> q, k = np.ones((2, 1, 1), np.float32), np.array([0.0, 1.0], np.float32).reshape(2, 1, 1)
    >>> lengths = np.array([0, 2], np.int32)
    >>> batch = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    >>> _, lse = msa_cpp.dense_attention(q, k, k, return_lse=True, **batch)
    >>> flat = np.zeros((2, 1), np.float32)  # index keys
    >>> index_lse = msa_cpp.index_lse(q, flat, **batch)
    >>> kl = msa_cpp.kl_loss(q, k, lse, q, flat, index_lse, **batch)
    >>> kl[1].round(3)  # of (0.269, 0.731) from (0.5, 0.5); query 0 has no choice
    array([0.111], dtype=float32)
    """
    return call("kl_loss", (q, k, lse, q_idx, k_idx, index_lse, block_ids, None, None, None, None,
                            out), (True,), batch, keywords, softmax_scale)


def kl_backward(
    q: Array, k: Array, lse: Array, q_idx: Array, k_idx: Array, index_lse: Array,
    block_ids: Array | None = None, *, softmax_scale: float | None = None,
    row_ptr: Array | None = None, entries: Array | None = None, dq_idx: Array | None = None,
    dk_idx: Array | None = None, kl: Array | None = None, return_kl: bool = False,
    batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> tuple[Array, Array] | Any:
    """The gradients of the KL loss by q_idx and k_idx; lambda is the caller's factor.

    The loss is the mean of `kl_loss` over the ``cu_seqlens_q[B]`` queries and the Hkv groups, so
    ``dS = (Pi - P) / (queries * Hkv) / sqrt(Di)``, ``dq_idx = sum dS k_idx`` over tokens and
    ``dk_idx = sum dS q_idx`` over queries and groups. The teacher has no gradient. No array of
    queries times keys is ever made.

    Args:
        row_ptr, entries: int32 ``[Hkv,NB+1]`` and ``[Hkv,T*K]``, as `block_lists` returns them.
        dq_idx, dk_idx: ``[T,Hi,Di]`` and ``[S,Di]``, of the dtype of q_idx, or float32.
        kl: optional result, float32 ``[T,Hi]``: that of `kl_loss`, which costs little here.

    The other arguments are those of `kl_loss`. Returns ``(dq_idx, dk_idx)``.
    Source: training of the index branch, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> q, k = np.ones((2, 1, 1), np.float32), np.array([0.0, 1.0], np.float32).reshape(2, 1, 1)
    >>> lengths = np.array([0, 2], np.int32)
    >>> batch = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    >>> _, lse = msa_cpp.dense_attention(q, k, k, return_lse=True, **batch)
    >>> flat = np.zeros((2, 1), np.float32)
    >>> index_lse = msa_cpp.index_lse(q, flat, **batch)
    >>> dq_idx, dk_idx = msa_cpp.kl_backward(q, k, lse, q, flat, index_lse, **batch)
    >>> dk_idx.ravel().round(3)  # (1/2 - 0.269) / 2 queries, and its opposite
    array([ 0.116, -0.116], dtype=float32)
    """
    return call("kl_backward", (q, k, lse, q_idx, k_idx, index_lse, block_ids, row_ptr, entries,
                                dq_idx, dk_idx, wanted(kl, return_kl)),
                (True, True, return_kl), batch, keywords, softmax_scale)
