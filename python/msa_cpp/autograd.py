"""MSA and the loss of its index branch under torch's autograd: what a training loop calls.

    o, kl = msa_cpp.msa_attention(q, k, v, q_idx, k_idx, topk=16, return_kl=True,
                                  cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    (loss_of(o) + weight * kl).backward()

is made of the functions here, for loops that put another selector or another loss in their place.
All work under ``torch.compile(fullgraph=True)``. Sequences are packed: cu_seqlens int32 ``[B+1]``
on the device of q says where they begin, max_seqlen is a bound of their lengths in tokens, optional
on the CPU. Shapes are written with the letters of `msa_cpp.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import torch_ops
from ._call import deprecated

KL_SUPPORTS = ("selected", "full")


@dataclass(frozen=True)
class MsaConfig:
    """How a layer attends and what its index branch learns from.

    block_size: Bk, tokens. topk: K, blocks per query and KV head; None is the warm-up, full
    attention in both branches. init_blocks, local_blocks: forced blocks, which count among the K.
    kl_support: the tokens over which teacher and student are compared: those of the selected
    blocks, or all visible ones ("full"), which costs one dense attention more and is what
    ``topk=None`` does anyway. softmax_scale: default 1/sqrt(D).

    Errors: ValueError that names the field, at construction.
    """

    block_size: int = 128
    topk: int | None = 16
    init_blocks: int = 0
    local_blocks: int = 1
    kl_support: str = "selected"
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size: got {self.block_size}, expected at least 1")
        for name in ("init_blocks", "local_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")
        forced = self.init_blocks + self.local_blocks
        if self.topk is not None and self.topk < max(1, forced):
            raise ValueError(f"topk: got {self.topk}, expected at least {max(1, forced)}, the "
                             "forced blocks, or None")
        if self.kl_support not in KL_SUPPORTS:
            raise ValueError(f"kl_support: got {self.kl_support!r}, supported are "
                             f"{' and '.join(KL_SUPPORTS)}")


def attention_and_loss(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, config: MsaConfig,
    batch: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(o, lse, block_ids, kl) of `msa_cpp.msa_attention`; batch: fields of a `Batch`.

    Under `torch.autocast` dtypes may be mixed: all are cast to that of autocast, which is that of o
    then, and gradients come back in the dtypes that were given.
    """
    cu_seqlens: Tensor = batch["cu_seqlens_q"]
    max_seqlen: int | None = batch.get("max_seqlen_q")
    if batch.get("cu_seqlens_k") is not cu_seqlens:
        raise ValueError("cu_seqlens_k: got another array than cu_seqlens_q, expected the same "
                         "with return_kl, which is for whole packed sequences")
    for name, default in (("q_offset", None), ("block_offset", None), ("causal", True)):
        if batch.get(name, default) is not default:
            raise NotImplementedError(f"{name}: given, supported with return_kl: {default}")
    ids: Tensor | None = None
    inverse: tuple[Tensor | None, Tensor | None] = (None, None)
    if config.topk is not None:
        ids = select(q_idx, k_idx, cu_seqlens, config, max_seqlen=max_seqlen)
        inverse = readers(ids, cu_seqlens, len(k), config, max_seqlen=max_seqlen)
    o, lse = attend(q, k, v, ids, cu_seqlens, config, inverse, max_seqlen=max_seqlen)
    compared, teacher = ids, lse
    if ids is not None and config.kl_support == "full":
        compared, inverse = None, (None, None)
        _, teacher = attend(q.detach(), k.detach(), v.detach(), None, cu_seqlens, config,
                            max_seqlen=max_seqlen)
    kl, _, _ = torch_ops.index_kl(
        q.detach(), k.detach(), teacher, q_idx, k_idx, compared, cu_seqlens, cu_seqlens,
        config.block_size, config.softmax_scale, *inverse, max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen)
    return o, lse, ids, kl


def msa_attention(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, cu_seqlens: Tensor,
    config: MsaConfig, *, max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A deprecated spelling of `msa_cpp.msa_attention` with ``return_kl=True``."""
    deprecated("msa_cpp.autograd.msa_attention", "msa_cpp.msa_attention(..., return_kl=True)")
    batch: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                             "max_seqlen_q": max_seqlen}
    o, _, _, kl = attention_and_loss(q, k, v, q_idx, k_idx, config, batch)
    return o, kl


def select(q_idx: Tensor, k_idx: Tensor, cu_seqlens: Tensor, config: MsaConfig, *,
           max_seqlen: int | None = None) -> Tensor:
    """int32 [Hkv,T,K]: the blocks of `config`; a choice has no gradient."""
    ids, _ = torch_ops.index_select(
        q_idx.detach(), k_idx.detach(), cu_seqlens, cu_seqlens, topk=config.topk,
        block_size=config.block_size, init_blocks=config.init_blocks,
        local_blocks=config.local_blocks, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
    return ids


def readers(ids: Tensor, cu_seqlens: Tensor, keys: int, config: MsaConfig, *,
            max_seqlen: int | None = None) -> tuple[Tensor, Tensor]:
    """(row_ptr, entries) of `block_lists`: made once, read by both gradients of a layer."""
    blocks = None  # on the CPU the lengths say how many there are
    if ids.is_cuda:  # there they are not read: a bound, behind which rows are empty
        batch, size = len(cu_seqlens) - 1, config.block_size
        longest = keys if max_seqlen is None else min(max_seqlen, keys)
        blocks = min(keys // size + batch, batch * ((longest + size - 1) // size))
    return torch_ops.block_lists(ids, cu_seqlens, cu_seqlens, block_size=config.block_size,
                                 num_blocks=blocks, max_seqlen_q=max_seqlen,
                                 max_seqlen_k=max_seqlen)


def attend(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, cu_seqlens: Tensor,
           config: MsaConfig, inverse: tuple[Tensor | None, Tensor | None] = (None, None), *,
           max_seqlen: int | None = None) -> tuple[Tensor, Tensor]:
    """(o, lse) over the listed blocks of any selector, or over all; o is differentiable.

    inverse: what `readers` makes of the lists; without it the backward makes it.
    """
    options = dict(block_size=config.block_size, softmax_scale=config.softmax_scale,
                   max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
    if block_ids is None:
        return torch_ops.dense_attention(q, k, v, cu_seqlens, cu_seqlens, **options)[:2]
    return torch_ops.sparse_attention(q, k, v, block_ids, cu_seqlens, cu_seqlens, **options,
                                      row_ptr=inverse[0], entries=inverse[1])
