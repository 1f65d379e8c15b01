"""A sparse layer's attention in one call: prefill, decode and training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._call import differentiated
from .batch import Batch, Keywords
from .ops import Array, dense_attention, index_select, msa_layer, sparse_attention

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["msa_attention"]


def msa_attention(
    q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array, *, topk: int | None = 16,
    init_blocks: int = 0, local_blocks: int = 1, softmax_scale: float | None = None,
    kl_support: str = "selected", out: Array | None = None, lse: Array | None = None,
    block_ids: Array | None = None, return_lse: bool = False, return_block_ids: bool = False,
    return_kl: bool = False, batch: Batch | None = None, **keywords: Unpack[Keywords],
) -> Array | Any:
    """Chooses the blocks of every query by the index branch, and attends to them.

    `index_select` and `sparse_attention` in one call, over packed keys or a paged cache that has
    the new tokens already (`append_paged`): the operator `msa_layer`. Over packed torch tensors
    that require gradients the output is differentiable in q, k and v.

    Args:
        q: ``[T,Hq,D]``, float32, bfloat16 or float16.
        k, v: ``[S,Hkv,D]`` or pages ``[P,Hkv,Bk,D]``, of the same dtype.
        q_idx: ``[T,Hi,Di]``; k_idx: ``[S,Di]`` or pages ``[P,Bk,Di]``: the index branch, after
            norm and RoPE.
        topk: K, the forced blocks included; None: all blocks.
        out: ``[T,Hq,D]`` of the dtype of q, or float32.
        lse, block_ids: optional results, float32 ``[T,Hq]`` and int32 ``[Hkv,T,K]``.
        return_kl: also a float32 scalar of torch, the KL loss of the index branch, which is
            differentiable in q_idx and k_idx: the mean over queries and KV heads of `kl_loss`. It
            needs the same `cu_seqlens_q` and `cu_seqlens_k`. The two losses do not meet: what
            depends on the output has no gradient in q_idx and k_idx, nor the KL loss in q, k and v.
        kl_support: the tokens that the KL loss compares over: those of the "selected" blocks, or
            "full", all visible ones, which costs one dense attention more.

    The other arguments and the errors are those of `msa_cpp.ops`; results come in the order out,
    lse, block_ids, kl. Rows behind the ``cu_seqlens_q[B]`` queries are padding: 0, and not in the
    loss. Source: MiniMax Sparse Attention, arXiv 2606.13392.

    >>> import numpy as np, msa_cpp
    >>> normal = np.random.default_rng(0).standard_normal
    >>> q, k, v = (normal((300, heads, 8), np.float32) for heads in (4, 2, 2))
    >>> q_idx, k_idx, ends = normal((300, 2, 8)), normal((300, 8)), np.array([0, 300], np.int32)
    >>> out, block_ids = msa_cpp.msa_attention(
    ...     q, k, v, q_idx.astype(np.float32), k_idx.astype(np.float32), topk=4, block_size=16,
    ...     cu_seqlens_q=ends, cu_seqlens_k=ends, return_block_ids=True)
    >>> out.shape, block_ids.shape, block_ids[:, -1, -1]  # the last block is a query's own
    ((300, 4, 8), (2, 300, 4), array([18, 18], dtype=int32))
    """
    described: dict[str, Any] = dict(keywords, batch=batch)
    known: Any = keywords if batch is None else vars(batch)
    if return_kl:
        if isinstance(q, np.ndarray):
            raise TypeError("q: got a NumPy array, expected a torch tensor with return_kl")
        from .autograd import MsaConfig, attention_and_loss

        config = MsaConfig(known.get("block_size", 128), topk, init_blocks, local_blocks,
                           kl_support, softmax_scale)
        for name, given in dict(out=out, lse=lse, block_ids=block_ids).items():
            if given is not None:
                raise ValueError(f"{name}: given, expected None with return_kl")
        of_torch: Any = attention_and_loss
        made = of_torch(q, k, v, q_idx, k_idx, config, known)
        asked = (True, return_lse, return_block_ids, True)
        return tuple(x for x, wanted in zip(made, asked) if wanted)
    if topk is None:
        if return_block_ids or block_ids is not None:
            raise ValueError("block_ids: asked for, expected a number as topk with it")
        return dense_attention(q, k, v, softmax_scale=softmax_scale, out=out, lse=lse,
                               return_lse=return_lse, **described)
    chosen: dict[str, Any] = dict(topk=topk, init_blocks=init_blocks, local_blocks=local_blocks)
    attended: dict[str, Any] = dict(softmax_scale=softmax_scale, out=out, lse=lse,
                                    return_lse=return_lse)
    if not differentiated(q, k, v):
        return msa_layer(q, q_idx, k, v, k_idx, **chosen, **attended, block_ids=block_ids,
                         return_block_ids=return_block_ids, **described)
    ids = index_select(q_idx, k_idx, **chosen, out=block_ids, **described)
    results: Any = sparse_attention(q, k, v, ids, **attended, **described)
    if not return_block_ids:
        return results
    return (*results, ids) if return_lse else (results, ids)
